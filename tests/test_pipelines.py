"""Stages of torch's pipelines: banks move once per step, by the mean of all micro-batches.

The schedules differ in the order of forwards and backwards, and zero-bubble ones split a backward
into one for inputs and one for weights. Both are tried here by the calls that a stage makes of
them, in one process; a whole pipeline runs on two ranks.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import (
    stage_backward,
    stage_backward_input,
    stage_backward_weight,
)
from torch.multiprocessing import ProcessRaisedException

from exfusion_testing.pipelines import (
    MICRO_BATCHES,
    SCHEDULES,
    STEPS,
    Pipeline,
    loss_of,
    on_one_rank,
    wrapped,
)
from exfusion_testing.ranks import on_ranks
from exfusion_testing.sharded import VARIANTS
from exfusion_testing.step_models import Net, assert_same


def by_plan(
    plan: str, variant: str, fuse_on: str, compiler: str | None = None
) -> dict[str, Tensor]:
    """A stage that gets its inputs from another one.

    Args:
        plan: the backwards of each step, with the number of the micro-batch: B for a whole one, I
            for inputs and W for weights.
        variant: of the fusion weights.
        fuse_on: when they fuse.
        compiler: of each block.
    """
    torch.manual_seed(0)
    stage: Any = wrapped(nn.Sequential(*Net().blocks), variant, fuse_on)
    for block in stage if compiler else []:
        block.compile(backend=compiler)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 8, dtype=torch.float64, generator=generator)
        inputs = [part.clone().requires_grad_() for part in x.chunk(MICRO_BATCHES)]
        losses = [loss_of(stage(part)) for part in inputs]
        left: dict[int, Any] = {}
        for what, index in ((word[0], int(word[1])) for word in plan.split()):
            if what == "B":
                stage_backward(losses[index], None, [inputs[index]])
            elif what == "I":
                _, left[index] = stage_backward_input(
                    [losses[index]], None, [inputs[index]], stage.parameters()
                )
            else:
                stage_backward_weight(stage.parameters(), left[index])
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in stage.state_dict().items()}


ZERO_BUBBLE = ["I0 I1 W0 W1 I2 I3 W2 W3", "B0 I1 W1 B2 I3 W3", "I0 W0 B1 I2 B3 W2"]


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 refuses functions of autograd")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("plan", ZERO_BUBBLE)
def test_votes_follow_the_gradient_of_the_weights(plan: str, variant: str) -> None:
    expected = by_plan("B0 B1 B2 B3", variant, "step")
    assert_same(by_plan(plan, variant, "step"), expected)


@pytest.mark.compiled
def test_compiled_code_votes_once_though_it_runs_for_inputs_and_for_weights() -> None:
    expected = by_plan("B0 B1 B2 B3", "mb", "step")
    assert_same(by_plan("I0 W0 B1 I2 B3 W2", "mb", "step", "aot_eager"), expected)


@pytest.mark.parametrize("plan", ZERO_BUBBLE)
def test_under_forward_static_weights_follow_the_gradient_too(plan: str) -> None:
    assert_same(by_plan(plan, "sw", "forward"), by_plan("B0 B1 B2 B3", "sw", "forward"))


@pytest.mark.parametrize("variant", ["dw", "mb"])
@pytest.mark.parametrize("plan", ZERO_BUBBLE)
def test_under_forward_other_weights_refuse_zero_bubbles(plan: str, variant: str) -> None:
    with pytest.raises(RuntimeError, match='"forward". Wrap with fuse_on="step"'):
        by_plan(plan, variant, "forward")


RUNS = [
    ("GPipe", "forward", "sharded"),
    ("Interleaved1F1B", "forward", "sharded"),
    ("Interleaved1F1B", "step", "plain"),
    ("ZBV", "step", "plain"),
    ("ZBV", "step", "sharded"),
]


def pipelines(rank: int, runs: list[tuple[str, str, str]]) -> list[dict[str, Tensor]]:
    """Two ranks of one stage or two each, whose shapes torch infers by an extra forward."""
    return [
        Pipeline(schedule, "mb", fuse_on, layout).train().state()
        for schedule, fuse_on, layout in runs
    ]


@pytest.mark.processes
def test_a_pipeline_trains_as_one_rank() -> None:
    first, second = on_ranks(2, pipelines, RUNS)
    for (schedule, fuse_on, _), ours, others in zip(RUNS, first, second, strict=True):
        assert_same(ours | others, on_one_rank(2 * SCHEDULES[schedule][1], "mb", fuse_on))


@pytest.mark.processes
def test_a_resharded_stage_refuses_zero_bubbles() -> None:
    with pytest.raises(ProcessRaisedException, match="without zero bubbles, such as 1F1B"):
        on_ranks(2, pipelines, [("ZBV", "step", "resharded")])
