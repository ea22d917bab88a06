"""`exfusion_param.study`: statistics by hand, runs that survive, and errors that name the cause."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import exfusion_param as exf
from exfusion_param import cli, study
from exfusion_param.study import models, processes
from exfusion_param.study.runs import Numbers, record_of
from exfusion_param.study.statistics import paired, smallest_told, student_t

ROOT = Path(__file__).parents[1]
ARMS = {"control": "control", "ours": "ours"}


def by_hand(run: study.Run) -> Numbers:
    """The metric of the control is 1, 2, 4 for seeds 0, 1, 2; that of ours 0.5, 1, 1.5 more."""
    gain = 0.5 * (run.seed + 1) if run.arm == "ours" else 0.0
    rate = 0.0 if run.lr is None else -abs(run.lr - (3.0 if run.arm == "ours" else 1.0))
    return {
        "metric": 2.0 ** (run.seed % 1000) + gain + rate,
        "seconds": 1.5 if run.arm == "ours" else 1.0,
    }


def compare(trial: Callable[[study.Run], Numbers], out: Path, **more: object) -> study.Comparison:
    given = {"control": "control", "seeds": (0, 1, 2), "out": out} | more
    return study.compare(trial, ARMS, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("freedom", "two_sided_95"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (19, 2.0930), (30, 2.0423)],
)
def test_students_t_is_that_of_the_tables(freedom: int, two_sided_95: float) -> None:
    assert student_t(0.95, freedom) == pytest.approx(two_sided_95, abs=1e-4)


def test_what_seeds_can_tell_is_as_by_hand() -> None:
    difference = paired([1.5, 3.0, 5.5], [1.0, 2.0, 4.0])  # 0.5, 1, 1.5
    assert difference.mean == pytest.approx(1.0)
    assert difference.error == pytest.approx(0.5 / math.sqrt(3))
    assert smallest_told(difference) == pytest.approx(4.3027 * 0.5 / math.sqrt(3), rel=1e-4)
    two = student_t(0.975, 2)  # Bonferroni
    assert two == pytest.approx(6.2053, abs=1e-4)
    assert smallest_told(difference, comparisons=2) == pytest.approx(two * difference.error)


def test_the_table_and_the_sentence_say_what_was_measured(tmp_path: Path) -> None:
    found = compare(by_hand, tmp_path, metric="score")
    assert found.table() == [
        {"arm": "control", "score, 3 seeds": "2.33 ± 1.53", "minus control": ""}
        | {"time, control = 1": "1.00"},
        {"arm": "ours", "score, 3 seeds": "3.33 ± 2.02", "minus control": "+1.00 ± 0.29"}
        | {"time, control = 1": "1.50"},
    ]
    chance = "ours is 1.00 ± 0.29 better than control, which is not significant (less than 1.24)"
    assert found.sentence().startswith(f"With 3 seeds, at 95% confidence: {chance}")
    more = compare(by_hand, tmp_path, seeds=range(10), better="less").sentence()
    assert "ours is 2.75 ± 0.48 worse than control, which is significant (more than 1.08)" in more
    assert "One seed cannot tell" in compare(by_hand, tmp_path, seeds=[0]).sentence()
    same = compare(lambda run: float(run.seed), tmp_path / "same").sentence()
    assert same.endswith("ours equals control in every seed.")


def test_equal_time_is_a_control_as_long_as_the_arm_takes(tmp_path: Path) -> None:
    lengths = {}

    def trial(run: study.Run) -> Numbers:
        lengths[run] = run.length
        return by_hand(run)

    found = compare(trial, tmp_path, equal_time="ours")
    assert list(found.results) == ["control", "ours", "control, as long as ours takes"]
    assert sorted(lengths.values()) == [1.0] * 6 + [1.5] * 3
    assert "control, as long as ours takes, is 1.00 ± 0.29 worse than ours" in found.sentence()


def test_each_arm_takes_the_rate_that_is_best_for_it(tmp_path: Path) -> None:
    seen = []

    def trial(run: study.Run) -> Numbers:
        seen.append(run)
        if run.lr == 2.0 and run.arm == "ours":
            raise RuntimeError("diverged")
        return by_hand(run)

    found = compare(trial, tmp_path, rates=(1.0, 2.0, 3.0, 4.0))
    assert found.lr == {"control": 1.0, "ours": 3.0}
    assert [row["rate"] for row in found.table()] == ["1", "3"]
    tuned = [run for run in seen if run.tuning]
    assert len(tuned) == 16
    assert {run.seed for run in tuned} == {1000, 1001}
    assert "Took an end of the grid, so a wider one may suit better: control." in " ".join(
        found.notes
    )
    assert "ours, seed 1000, lr 2, tuning failed, so that its rate was not chosen" in str(found)
    assert compare(lambda run: -by_hand(run)["metric"], tmp_path / "less",  # type: ignore[index]
                   rates=(1.0, 2.0, 3.0), better="less").lr == found.lr  # fmt: skip


def test_a_failing_run_loses_no_other_and_is_done_again(tmp_path: Path) -> None:
    calls = []

    def trial(run: study.Run) -> Numbers:
        calls.append(run)
        if run == study.Run("ours", 1) and len(calls) < 7:
            raise ValueError("the disk is full")
        return by_hand(run)

    with pytest.raises(
        RuntimeError, match=r"(?s)1 of 6 runs failed.*ours, seed 1: .*the disk is full"
    ):
        compare(trial, tmp_path)
    (said,) = (tmp_path / "runs").glob("*.error.txt")
    assert "in trial" in said.read_text()
    assert compare(trial, tmp_path).difference("ours").mean == 1.0
    assert calls[6:] == [study.Run("ours", 1)]
    assert not said.exists()


def test_a_record_is_one_line_and_holds_all_numbers(tmp_path: Path) -> None:
    run = study.Run("a/b: c", 3, 0.1)
    results, failures = processes.finish(lambda run: {"metric": 0.1, "seen": 2}, [run], tmp_path)
    assert not failures
    assert results[run].metric == 0.1
    assert results[run].more == {"seen": 2.0}
    assert record_of(run, tmp_path).parent == tmp_path
    (line,) = record_of(run, tmp_path).read_text().splitlines()
    assert json.loads(line)["arm"] == "a/b: c"
    assert len({record_of(run._replace(arm=arm), tmp_path) for arm in ("a b", "a-b", "a/b")}) == 3


SCRIPT = """
import multiprocessing, os, time
from pathlib import Path
from exfusion_param import study
from exfusion_param.study import processes

def trial(run):
    if run.arm == "dies" and not Path("dead").exists():
        Path("dead").touch()
        os._exit(3)
    if run.arm == "raises":
        raise ValueError("no such data")
    time.sleep(0.05 * run.seed)
    with open("log", "a") as log:
        log.write(f"{run}\\n")
    return float(run.seed)

if __name__ == "__main__":
    processes.START_METHOD = "forkserver"  # as fast as what most of these runs do
    multiprocessing.set_forkserver_preload(["exfusion_param.study"])
    arms = {name: name for name in ARMS}
    study.compare(trial, arms, control="control", out="out", seeds=range(4), at_once=2)
"""


def started(tmp_path: Path, arms: list[str]) -> subprocess.Popen[str]:
    (tmp_path / "script.py").write_text(SCRIPT.replace("ARMS", repr(arms)))
    command = [sys.executable, "script.py"]
    return subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)


@pytest.mark.processes
def test_processes_that_die_or_raise_take_no_other_with_them(tmp_path: Path) -> None:
    process = started(tmp_path, ["control", "dies", "raises"])
    error = process.communicate()[1]
    assert "5 of 12 runs failed" in error
    assert "dies, seed 0: its process ended with exit code 3" in error
    assert "raises, seed 3: ValueError: no such data" in error
    assert len(list((tmp_path / "out" / "runs").glob("*.json"))) == 7


@pytest.mark.processes
def test_a_killed_study_goes_on_where_it_was(tmp_path: Path) -> None:
    process = started(tmp_path, ["control", "ours"])
    while not list((tmp_path / "out" / "runs").glob("*.json")):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()  # as soon as the runs that were under way have ended
    again = started(tmp_path, ["control", "ours"])
    assert "Traceback" not in again.communicate()[1]
    assert again.returncode == 0
    done = (tmp_path / "log").read_text().splitlines()
    assert sorted(done) == sorted(f"{arm}, seed {seed}" for arm in ARMS for seed in range(4))


def test_what_other_processes_cannot_import_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="at the top of a module, not within a function"):
        compare(lambda run: 1.0, tmp_path, at_once=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"control": "dense"}, r"control must be one of the arms \(control, ours\), got 'dense'"),
        ({"seeds": ()}, "seeds must be different numbers"),
        ({"seeds": (1, 1)}, "seeds must be different numbers"),
        ({"rates": (1.0, 2.0), "tuning_seeds": (0,)}, "must differ from seeds"),
        ({"at_once": 0}, "at_once must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_named(
    given: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(by_hand, tmp_path, **given)


def test_a_run_that_returns_no_number_says_what_to_return(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"got None\. Return float\(accuracy\)"):
        compare(lambda run: None, tmp_path)  # type: ignore[arg-type,return-value]


# The user's model


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).double()


def train(model: nn.Module, seed: int) -> float:
    """Under SGD the mean of N experts moves as one dense weight at N times the rate (F2)."""
    x = torch.randn(32, 4, dtype=torch.float64)
    stacks = [p for name, p in model.named_parameters() if name.endswith("original")]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4 if stacks else 0.1)
    for _ in range(5):
        (model(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return (model(x) - x).square().mean().item()


def test_the_arms_start_from_the_same_draws_and_see_the_same_batches(tmp_path: Path) -> None:
    found = study.run(build, train, out=tmp_path, variants=["sw"], seeds=(0, 1), better="less")
    assert found.values("sw") == pytest.approx(found.values("control"), rel=1e-12)
    assert found.values("dense") != pytest.approx(found.values("control"), rel=1e-3)
    assert found.values("dense")[0] != found.values("dense")[1]
    assert "Equal steps only" in str(found)
    assert (tmp_path / "study.md").read_text() == f"{found}\n"
    assert (tmp_path / "study.svg").exists()


def test_train_gets_what_it_has_parameters_for(tmp_path: Path) -> None:
    given = []

    def all_of(model: nn.Module, seed: int, *, lr: float, length: float, tuning: bool) -> Numbers:
        given.append((seed, lr, length, tuning))
        return {"metric": seed, "seconds": sum(p.numel() for p in model.parameters())}

    study.run(build, all_of, out=tmp_path, variants=["sw"], seeds=[0], rates=[0.1, 0.2])
    assert [which for which in given if which[3]] == [
        (seed, lr, 1.0, True) for seed in (1000, 1001) for lr in (0.1, 0.2) for _ in range(3)
    ]
    assert [which[2] for which in given if not which[3]] == [1.0, 1.0, 1.0, 4.0]  # experts
    with pytest.raises(
        TypeError, match=r"has no parameter lr\. Add one, as in train\(model, seed, lr"
    ):
        study.run(build, train, out=tmp_path, rates=[0.1])
    with pytest.raises(TypeError, match=r"with lr if there are rates \(got \[\]\), but: missing"):
        study.run(build, all_of, out=tmp_path)


def test_another_config_needs_another_folder_and_changed_code_warns(tmp_path: Path) -> None:
    first = study.run(build, train, out=tmp_path, variants=["dw"], seeds=(0, 1))
    with pytest.raises(ValueError, match=r"other settings \(num_experts differ\)\. Take another"):
        study.run(build, train, out=tmp_path, config=exf.ExFusionConfig(num_experts=3))
    trial = models.ModelTrial(build, by_hand, exf.ExFusionConfig(), ())
    with pytest.warns(UserWarning, match="build or by_hand has changed since"):
        models._warn_of_changed_code(tmp_path, trial)
    again = study.run(build, train, out=tmp_path, variants=["dw"], seeds=(0, 1))
    assert again.results == first.results


# The command line and the page


def page() -> str:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/study.md").read_text(), re.M | re.S)[
        0
    ]


def test_the_pages_script_is_short() -> None:  # test_docs.py runs it
    lines = [
        line for line in page().splitlines() if line and not line.startswith(("import", "from"))
    ]
    assert len(lines) <= 20


@pytest.mark.processes
def test_the_command_runs_functions_of_the_users_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_own_task.py").write_text(page().split("if __name__")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    command = ["study", "my_own_task:train", "--seeds", "0", "--variants", "sw", "--at-once", "2"]
    cli.main(command)
    assert "| sw |" in capsys.readouterr().out
    for name, message in (
        ("train", "train must be MODULE:FUNCTION, such as my_task:train, got 'train'"),
        ("my_own_task:trains", "The module my_own_task has no function 'trains'"),
        ("no_such_task:train", "The module no_such_task is neither in this folder"),
        ("my_own_task:build", "build is called as train(model, seed)"),
    ):
        with pytest.raises(SystemExit, match=re.escape(message)):
            cli.main(["study", name])
    (tmp_path / "my_bad_task.py").write_text("def build(): 1 / 0\ndef train(model, seed): ...\n")
    with pytest.raises(SystemExit, match=r"15 of 15 runs failed.*ZeroDivisionError"):
        cli.main(["study", "my_bad_task:train", "--variants", "sw", "--out", "bad"])
