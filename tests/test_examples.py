"""The examples run in their smoke form, leave what they promise, and are listed."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from exfusion_param import cli
from exfusion_param.history import read_history
from exfusion_testing import processes

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = sorted(path.name for path in EXAMPLES.glob("*.py"))

PRINTED = {
    "quickstart.py": "fused and trained logits differ by 0 at most",
    "timm_ema.py": r"average ([\d.]+) %, average fused and loaded \1 %",
    "hf_trainer.py": r"trained ([\d.]+) %, fused and loaded \1 %",
    "lightning_fit.py": r"average ([\d.]+) %, fused and loaded \1 %",
    "accelerate_train.py": r"test accuracy of the fused model [\d.]+ %",
}
COPIED = [*PRINTED, "fsdp_train.py", "resume_train.py"]
BOARDS = ["hf_trainer.py", "lightning_fit.py", "accelerate_train.py"]
CONTINUED = ["hf_trainer.py", "lightning_fit.py", "accelerate_train.py"]

pytestmark = [pytest.mark.examples, pytest.mark.processes]


class First(NamedTuple):
    """The first epoch of an example: what it printed, and its folder."""

    printed: str
    folder: Path


def run(name: str, *arguments: object) -> str:
    return processes.run(EXAMPLES / name, "--smoke", *arguments)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], First]:
    """The first epoch of an example, which is trained once."""
    runs: dict[str, First] = {}

    def of(name: str) -> First:
        if name not in runs:
            out = tmp_path_factory.mktemp(name)
            epochs = ("--epochs", 1) if name in CONTINUED else ()
            runs[name] = First(run(name, "--out", out, *epochs), out)
        return runs[name]

    return of


@pytest.mark.parametrize("name", PRINTED)
def test_it_trains_ships_the_same_model_and_logs_for_the_plots(
    name: str, first: Callable[[str], First], tmp_path: Path
) -> None:
    printed, folder = first(name)
    assert re.search(PRINTED[name], printed)
    (path,) = folder.rglob("metrics.csv")
    history = read_history(path)
    assert any(column.startswith("bank_mass/") for column in history)
    assert "loss" in history
    assert (name in BOARDS) == any(folder.rglob("events.out.tfevents.*"))
    shutil.copy(path, tmp_path)
    cli.main(["plot", str(tmp_path)])
    assert (tmp_path / "fusion_weights.png").exists()


def losses_by_step(folder: Path) -> dict[float, float]:
    losses: dict[float, float] = {}
    for path in folder.rglob("metrics.csv"):
        history = read_history(path)
        for step, loss in zip(history["step"], history["loss"], strict=True):
            if loss == loss:
                assert step not in losses  # no step runs twice
                losses[step] = loss
    return losses


@pytest.mark.parametrize("name", CONTINUED)
def test_the_same_command_continues_a_run(
    name: str, first: Callable[[str], First], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(first(name).folder, out)
    before = losses_by_step(out)
    assert re.search(PRINTED[name], run(name, "--out", out, "--epochs", 2))
    after = losses_by_step(out)
    assert {step: after[step] for step in before} == before
    assert len(after) == 2 * len(before)


@pytest.mark.parametrize(
    ("name", "checkpoint"),
    [("hf_trainer.py", "checkpoint-2"), ("accelerate_train.py", "state")],
)
def test_what_its_docstring_fuses_on_the_command_line(
    name: str, checkpoint: str, first: Callable[[str], First], tmp_path: Path
) -> None:
    cli.main(["fuse", str(first(name).folder / checkpoint), str(tmp_path / "dense")])
    assert (tmp_path / "dense" / "model.safetensors").exists()


def test_it_starts_as_its_docstring_says(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "quickstart.py", "--smoke", "--out", tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(PRINTED["quickstart.py"], ended.stdout)


def test_minilm_is_fine_tuned_dense_upcycled_and_merged(tmp_path: Path) -> None:
    data = tmp_path / "sentences.tsv"
    lines = [f"{i}\t{rating}\tA {word} film." for i, (rating, word) in enumerate(
        [(2.5, "good"), (-1.5, "bad")] * 10
    )]  # fmt: skip
    data.write_text("\n".join(lines))
    printed = run("meo_finetune.py", "--data", data, "--out", tmp_path / "meo")
    table = (tmp_path / "meo" / "results.md").read_text()
    assert table in printed
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        f"| {run}"
        for run in ("dense", "vanilla MoE", "MEO task", "MEO sequence", "MEO token", "ExFusion mb")
    ]
    out = tmp_path / "out"
    printed = run("upcycle_minilm.py", "--data", data, "--out", out)
    assert "loaded from disk its logits differ by 0 at most" in printed
    assert "upcycled" in printed
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "seed-0"}


@pytest.mark.parametrize("name", COPIED)
def test_an_example_of_one_library_is_one_file(name: str) -> None:
    text = (EXAMPLES / name).read_text()
    assert "support" not in text
    marked = [line for line in text.splitlines() if "# ExFusion" in line]
    assert 4 <= len(marked) <= 7


def test_each_is_short_and_in_the_table() -> None:
    table = (EXAMPLES / "README.md").read_text()
    assert re.findall(r"^\| \[(\w+\.py)\]\(\1\)", table, re.MULTILINE) == sorted(
        FILES, key=table.index
    )
    for name in FILES:
        assert len((EXAMPLES / name).read_text().splitlines()) < 150, name
        commands = (f"python examples/{name}", f"make {Path(name).stem}", f" 2 examples/{name}")
        assert any(command in table for command in commands)
