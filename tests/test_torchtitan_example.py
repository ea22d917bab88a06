"""The torchtitan example trains one model under any layout, and after a stop under another one."""

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


@pytest.mark.parametrize(
    ("layout", "resumed_on"), [(("--tp", 2), 2), (("--pp", 2), 1), (("--tp", 2, "--pp", 2), None)]
)
def test_a_layout_equals_one_rank_also_when_it_changes(
    layout: tuple[object, ...],
    resumed_on: int | None,
    one_rank: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    steps = () if resumed_on is None else ("--steps", 2)
    state = train(tmp_path, 4, *layout, *steps)
    if resumed_on is not None:
        state = train(tmp_path, resumed_on)
    assert "layers.0.feed_forward.w1.weight" in state
    torch.testing.assert_close(state, one_rank, **TOLERANCE)
