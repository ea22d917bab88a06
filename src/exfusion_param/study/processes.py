"""Several runs at once, each in a process of its own: one that dies takes no other with it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from .runs import Result, Run, Trial, attempt, error_of, read, record_of

START_METHOD = "spawn"  # a fork cannot use CUDA once its parent has


def finish(
    trial: Trial, runs: Sequence[Run], folder: Path, at_once: int = 1
) -> tuple[dict[Run, Result], dict[Run, str]]:
    """Do what has not ended yet, and read all results.

    Returns:
        The results of all that have ended, and why others failed.

    Raises:
        TypeError: several at once, and other processes cannot import the trial.
        ValueError: `at_once` is below 1.
    """
    if at_once < 1:
        raise ValueError(f"at_once must be at least 1, got {at_once}.")
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [run for run in dict.fromkeys(runs) if not record_of(run, folder).exists()]
    failures: dict[Run, str] = {}
    done = 0

    def ended(run: Run, failure: str) -> None:
        nonlocal done
        done += 1
        if failure:
            failures[run] = failure
            said = f"failed: {failure}"
        else:
            result = read(run, folder)
            said = f"{result.metric:.5g} in {result.seconds:.3g} s"
        print(f"{done}/{len(waiting)} {run}: {said}", file=sys.stderr, flush=True)

    if at_once == 1:
        for run in waiting:
            ended(run, attempt(trial, run, folder))
    elif waiting:
        _check_importable(trial)
        _in_processes(trial, waiting, folder, at_once, ended)
    return {run: read(run, folder) for run in runs if run not in failures}, failures


def _in_processes(
    trial: Trial,
    waiting: Sequence[Run],
    folder: Path,
    at_once: int,
    ended: Callable[[Run, str], None],
) -> None:
    context: Any = multiprocessing.get_context(START_METHOD)
    left, places = list(waiting), list(range(at_once))
    running: dict[int, tuple[BaseProcess, Run, int]] = {}  # by the sentinel
    try:
        while left or running:
            while left and places:
                run, place = left.pop(0), places.pop(0)
                error_of(run, folder).unlink(missing_ok=True)
                arguments = (trial, run, folder, place, at_once)
                process = context.Process(target=_do, args=arguments)
                process.start()
                running[process.sentinel] = process, run, place
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                process, run, place = running.pop(sentinel)
                process.join()
                places.append(place)
                ended(run, _why_failed(process, run, folder))
    finally:
        for process, _, _ in running.values():
            process.terminate()
            process.join()


def _do(trial: Trial, run: Run, folder: Path, place: int, at_once: int) -> None:
    """In a process: one run, with its share of the cores, and a GPU where there are some."""
    share = max(1, (os.cpu_count() or 1) // at_once)
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", str(share))))
    if torch.cuda.is_available():
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible = given.split(",") if given else list(map(str, range(torch.cuda.device_count())))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[place % len(visible)]  # read at the first use
    if attempt(trial, run, folder):
        raise SystemExit(1)


def _why_failed(process: BaseProcess, run: Run, folder: Path) -> str:
    if record_of(run, folder).exists():
        return ""
    path = error_of(run, folder)
    if path.exists():
        return path.read_text().strip().splitlines()[-1]
    return f"its process ended with exit code {process.exitcode}; see what it printed."


def _check_importable(trial: Trial) -> None:
    try:
        pickle.dumps(trial)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"With at_once above 1, other processes import what a study runs, but: {error}. Define "
            "the functions at the top of a module, not within a function, or pass at_once=1."
        ) from error
