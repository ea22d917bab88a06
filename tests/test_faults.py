"""Short forms of `make faults`: kills, stops, damaged and malformed files, a long run."""

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import faults
from exfusion_testing.processes import FORKS, Script, start_ranks
from fault_files import corrupt_checkpoints, fuzz_files
from fault_steps import fill_disks, poison
from soak import soak

SHORT = faults.Settings(stops=1, limit=400, out=None)


@pytest.fixture
def _forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs start as forks, but for those that torchrun is to start again."""
    by_torchrun = faults.start

    def start(ranks: int, folder: Path, limit: int) -> Any:
        if ranks > 1 and folder.name != "calm":
            return by_torchrun(ranks, folder, limit)
        command = (faults.SCRIPT, *faults.SMALL, "--limit", limit, "--out", folder)
        if ranks == 1:
            return Script(*command)
        others, last = (all_ranks := start_ranks(ranks, *command))[:-1], all_ranks[-1]
        for script in others:
            script.finish()
        return last

    monkeypatch.setattr(faults, "start", start)


@pytest.mark.processes
@pytest.mark.usefixtures("_forks")
@pytest.mark.parametrize(("ranks", "kills"), [(1, 2), (2, 1)])
def test_killed_runs_end_as_undisturbed_ones_bit_by_bit(ranks: int, kills: int) -> None:
    row = faults.kills(ranks, dataclasses.replace(SHORT, kills=kills))
    assert (row.times, row.wrong) == (kills, 0)


@pytest.mark.processes
@pytest.mark.usefixtures("_forks")
def test_a_run_that_is_told_to_stop_loses_no_step() -> None:
    row = faults.stops(1, SHORT)
    assert (row.times, row.lost_steps, row.wrong) == (1, 0, 0)


def test_damaged_checkpoints_are_passed_over() -> None:
    times, survived, _, wrong = corrupt_checkpoints(20, seed=1)
    assert (survived, wrong) == (times, 0)


def test_full_disks_and_poisoned_steps_lose_nothing() -> None:
    for times, survived, _, wrong in (fill_disks(5, seed=1), poison(5, seed=1)):
        assert (survived, wrong) == (times, 0)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_malformed_files_are_refused(seed: int) -> None:
    times, survived, _, wrong = fuzz_files(6, seed)
    assert (survived, wrong) == (times, 0)


@pytest.mark.processes
def test_a_long_run_holds_no_more_than_a_short_one() -> None:
    forks = multiprocessing.get_context(FORKS)
    with ProcessPoolExecutor(1, mp_context=forks) as fresh:  # nothing of other tests counts
        early, late = fresh.submit(soak, 800, save_every=80).result()
    assert late.handles <= early.handles
    assert late.threads <= early.threads
    assert late.files <= 3 * early.files  # as many checkpoints stay
    assert late.tensors <= early.tensors + 10
    assert late.mebibytes < early.mebibytes + 20


def test_the_table_has_a_line_for_each_fault() -> None:
    row = faults.Row("SIGKILL, 1 process", 2, 2, 1.5, 0)
    assert faults.table([row]).splitlines() == [
        "| fault | times | survived | lost steps | wrong |",
        "| --- | --- | --- | --- | --- |",
        "| SIGKILL, 1 process | 2 | 2 | 1.5 | 0 |",
    ]
