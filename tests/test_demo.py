"""The demo's script: its files, its check, and what a Ctrl-C or a kill does to it (nothing)."""

import csv
import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
from safetensors.torch import load_file

from exfusion_testing.processes import Script

pytestmark = [pytest.mark.examples, pytest.mark.processes]
DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


def start(out: Path, *arguments: str) -> Script:
    return Script(DEMO, "--smoke", "--out", out, *arguments, cwd=out.parent)


def metrics(out: Path, without: Sequence[str] = ()) -> list[dict[str, str]]:
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith(tuple(without))} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "run"
    return out, start(out).finish()


def test_it_leaves_a_model_that_timm_loads_and_a_report(uninterrupted: tuple[Path, str]) -> None:
    out, output = uninterrupted
    check = next(line for line in output.splitlines() if line.startswith("Check: "))
    assert check == "Check: fused and trained logits agree on 200 images, max difference 0"
    config = json.loads((out / "config.json").read_text())
    model = timm.create_model(**config["model"])
    model.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    plots = list(out.glob("*.png"))
    assert {plot.stem for plot in plots} >= {"loss", "accuracy", "fusion_weights", "bank_mass"}
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    report = (out / "report.html").read_text()
    assert check.removeprefix("Check: ") in report
    assert report.count("data:image/png;base64") == len(plots)
    assert [row["step"] for row in metrics(out)] == ["10", "20"]


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(
    by: signal.Signals, uninterrupted: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(out)
    while not (out / "checkpoints" / "latest").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(by)
    assert process.wait() != 0
    assert not (out / "model.safetensors").exists()
    if by != signal.SIGKILL:
        assert "The same command continues." in process.error
    start(out).finish()
    expected, _ = uninterrupted
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()
    assert metrics(out, without=["step_ms"]) == metrics(expected, without=["step_ms"])


def test_other_settings_for_the_same_folder_are_refused(uninterrupted: tuple[Path, str]) -> None:
    out, _ = uninterrupted
    process = start(out, "--variant", "dw", "--num-experts", "3")
    assert process.wait() == 1
    assert "holds a run with other settings (exfusion). Take another --out" in process.error
    assert "Traceback" not in process.error
