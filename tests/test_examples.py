"""The examples run in their smoke form, leave what they promise, and are listed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from exfusion_param.history import read_history

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = sorted(path.name for path in EXAMPLES.glob("*.py"))

PRINTED = {
    "quickstart.py": "fused and trained logits differ by 0 at most",
    "timm_ema.py": r"average ([\d.]+) %, average fused and loaded \1 %",
    "hf_trainer.py": r"trained ([\d.]+) %, fused and loaded \1 %",
    "lightning_fit.py": r"average ([\d.]+) %, fused and loaded \1 %",
    "accelerate_train.py": r"test accuracy of the fused model [\d.]+ %",
}


def run(name: str, *arguments: object) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--smoke", *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def exfusion(*arguments: object) -> None:
    command = Path(sys.executable).parent / "exfusion"
    subprocess.run([command, *map(str, arguments)], check=True)


@pytest.mark.parametrize("name", PRINTED)
def test_it_trains_ships_the_same_model_and_logs_for_the_plots(name: str, tmp_path: Path) -> None:
    assert re.search(PRINTED[name], run(name, "--out", tmp_path))
    (path,) = tmp_path.rglob("metrics.csv")
    history = read_history(path)
    assert any(column.startswith("bank_mass/") for column in history)
    assert "loss" in history
    assert list(tmp_path.rglob("events.out.tfevents.*"))
    exfusion("plot", path.parent)
    assert (path.parent / "fusion_weights.png").exists()


@pytest.mark.parametrize("name", ["hf_trainer.py", "lightning_fit.py", "accelerate_train.py"])
def test_the_same_command_continues_a_run(name: str, tmp_path: Path) -> None:
    def rows() -> dict[float, float]:
        histories = [read_history(path) for path in tmp_path.rglob("metrics.csv")]
        losses: dict[float, float] = {}
        for history in histories:
            for step, loss in zip(history["step"], history["loss"], strict=True):
                if loss == loss:
                    assert step not in losses  # no step runs twice
                    losses[step] = loss
        return losses

    run(name, "--out", tmp_path, "--epochs", 1)
    first = rows()
    assert re.search(PRINTED[name], run(name, "--out", tmp_path, "--epochs", 2))
    both = rows()
    assert {step: both[step] for step in first} == first
    assert len(both) == 2 * len(first)


@pytest.mark.parametrize(
    ("name", "checkpoint"),
    [("hf_trainer.py", "checkpoint-2"), ("accelerate_train.py", "state")],
)
def test_what_its_docstring_fuses_on_the_command_line(
    name: str, checkpoint: str, tmp_path: Path
) -> None:
    run(name, "--out", tmp_path, "--epochs", 1)
    exfusion("fuse", tmp_path / checkpoint, tmp_path / "from-checkpoint")
    assert (tmp_path / "from-checkpoint" / "model.safetensors").exists()


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


def test_each_is_short_and_in_the_table() -> None:
    table = (EXAMPLES / "README.md").read_text()
    assert re.findall(r"^\| \[(\w+\.py)\]\(\1\)", table, re.MULTILINE) == sorted(
        FILES, key=table.index
    )
    for name in FILES:
        assert len((EXAMPLES / name).read_text().splitlines()) < 150, name
        commands = (f"python examples/{name}", f"make {Path(name).stem}", f" 2 examples/{name}")
        assert any(command in table for command in commands)
