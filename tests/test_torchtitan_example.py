"""The torchtitan example trains one model under any layout, and after a stop under another one."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from exfusion_testing.processes import start_ranks

pytestmark = [pytest.mark.examples, pytest.mark.processes]

SCRIPT = Path(__file__).parents[1] / "examples" / "torchtitan_llama.py"

# Sums in float32 in another order. A step that is lost moves weights by the learning rate, 1e-3.
TOLERANCE = {"rtol": 0, "atol": 5e-6}


def train(out: Path, ranks: int, *arguments: object) -> dict[str, Tensor]:
    """The dense model that a run exports."""
    for script in start_ranks(ranks, SCRIPT, "--smoke", "--out", out, *arguments):
        script.finish()
    paths = (out / "dense").glob("*.safetensors")
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return train(tmp_path_factory.mktemp("one"), 1)


@pytest.mark.parametrize("layout", [("--tp", 2), ("--pp", 2)])
def test_a_run_that_stops_continues_on_another_layout(
    layout: tuple[object, ...], one_rank: dict[str, Tensor], tmp_path: Path
) -> None:
    train(tmp_path / "stopped", 4, *layout, "--steps", 2)
    assert (tmp_path / "stopped" / "step-000002" / ".metadata").is_file()
    for ranks, again in ((2, layout), (1, ())):
        folder = shutil.copytree(tmp_path / "stopped", tmp_path / f"on-{ranks}")
        torch.testing.assert_close(train(folder, ranks, *again), one_rank, **TOLERANCE)


def test_tensors_and_stages_together_equal_one_rank(
    one_rank: dict[str, Tensor], tmp_path: Path
) -> None:
    state = train(tmp_path, 4, "--tp", 2, "--pp", 2)
    assert "layers.0.feed_forward.w1.weight" in state
    torch.testing.assert_close(state, one_rank, **TOLERANCE)
