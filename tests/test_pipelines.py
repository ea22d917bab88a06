"""Stages of torch's pipelines: banks move once per step, by the mean of all micro-batches.

The schedules differ in the order of forwards and backwards, and zero-bubble ones split a backward
into one for inputs and one for weights. Both are tried here by the calls that a stage makes of
them, in one process; a whole pipeline runs on two ranks.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining._backward import (
    stage_backward,
    stage_backward_input,
    stage_backward_weight,
)
from torch.multiprocessing import ProcessRaisedException

import exfusion_param as exf
from exfusion_param.tensors.shards import full_tensor
from exfusion_testing.ranks import on_ranks
from exfusion_testing.sharded import VARIANTS
from exfusion_testing.step_models import Block, Net, assert_same, batch

MICRO_BATCHES = 4
STEPS = 2


def loss_of(y: Tensor, target: Tensor | None = None) -> Tensor:
    return (y.square() + y.sin()).mean()


def wrapped(stage: nn.Module, variant: Any, fuse_on: Any, group: Any = None) -> nn.Module:
    settings = {"variant": variant, "fuse_on": fuse_on, "seed": 1, "bank_init": "uniform"}
    return exf.wrap(stage, process_group=group, **settings)


def by_plan(plan: str, variant: str, fuse_on: str) -> dict[str, Tensor]:
    """A stage that gets its inputs from another one.

    Args:
        plan: the backwards of each step, with the number of the micro-batch: B for a whole one, I
            for inputs and W for weights.
        variant: of the fusion weights.
        fuse_on: when they fuse.
    """
    torch.manual_seed(0)
    stage = wrapped(nn.Sequential(*Net().blocks), variant, fuse_on)
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


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("plan", ZERO_BUBBLE)
def test_votes_follow_the_gradient_of_the_weights(plan: str, variant: str) -> None:
    expected = by_plan("B0 B1 B2 B3", variant, "step")
    assert_same(by_plan(plan, variant, "step"), expected)


@pytest.mark.parametrize("plan", ZERO_BUBBLE)
def test_under_forward_static_weights_follow_the_gradient_too(plan: str) -> None:
    assert_same(by_plan(plan, "sw", "forward"), by_plan("B0 B1 B2 B3", "sw", "forward"))


@pytest.mark.parametrize("variant", ["dw", "mb"])
@pytest.mark.parametrize("plan", ZERO_BUBBLE)
def test_under_forward_other_weights_refuse_zero_bubbles(plan: str, variant: str) -> None:
    with pytest.raises(RuntimeError, match='"forward". Wrap with fuse_on="step"'):
        by_plan(plan, variant, "forward")


SCHEDULES: dict[str, tuple[Any, int]] = {
    "GPipe": (ScheduleGPipe, 1),
    "Interleaved1F1B": (ScheduleInterleaved1F1B, 2),
    "ZBV": (ScheduleZBVZeroBubble, 2),
}
"""With the number of stages on each of the two ranks."""
RUNS = [
    ("GPipe", "forward", True),
    ("Interleaved1F1B", "step", False),
    ("ZBV", "step", False),
]


def stages(count: int, fuse_on: str, group: Any = None) -> list[Any]:
    torch.manual_seed(0)
    net = Net(depth=4)
    parts = [net.embed, *net.blocks, net.head]
    ends = {2: [0, 3, 6], 4: [0, 2, 3, 4, 6]}[count]
    made = [nn.Sequential(*parts[a:b]) for a, b in itertools.pairwise(ends)]
    return [wrapped(stage, "mb", fuse_on, group) for stage in made]


def alone(count: int, fuse_on: str) -> dict[str, Tensor]:
    made = stages(count, fuse_on)
    model = nn.Sequential(*made)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        for part in batch(step, size=8).chunk(MICRO_BATCHES):
            (loss_of(model(part)) / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict())


def pipeline(rank: int, runs: list[tuple[str, str, bool]] = RUNS) -> dict[str, dict[str, Tensor]]:
    """Two ranks of one stage or two each, whose shapes torch infers by an extra forward."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("stage", "data"))
    states = {}
    for name, fuse_on, is_sharded in runs:
        schedule, per_rank = SCHEDULES[name]
        count = 2 * per_rank
        own = [rank, count - 1 - rank if name == "ZBV" else rank + 2][:per_rank]
        every = stages(count, fuse_on, mesh["data"])
        mine = [every[index] for index in own]
        for stage in mine if is_sharded else []:
            for block in stage:
                if isinstance(block, Block):
                    fully_shard(block, mesh=mesh["data"], shard_placement_fn=exf.expert_placement)
            fully_shard(stage, mesh=mesh["data"])
        group = mesh.get_group("stage")
        made = [
            PipelineStage(stage, index, count, torch.device("cpu"), group=group)
            for stage, index in zip(mine, own, strict=True)
        ]
        run = schedule(made if per_rank > 1 else made[0], MICRO_BATCHES, loss_fn=loss_of)
        optimizer = torch.optim.SGD([p for stage in mine for p in stage.parameters()], lr=0.1)
        target = torch.zeros(8) if count - 1 in own else None
        for step in range(STEPS):
            run.step(*([batch(step, size=8)] if rank == 0 else []), target=target)
            optimizer.step()
            optimizer.zero_grad()
        states[name] = {
            f"{index}.{key}": full_tensor(value).detach().clone()
            for stage, index in zip(mine, own, strict=True)
            for key, value in stage.state_dict().items()
        }
    return states


@pytest.mark.processes
def test_a_pipeline_trains_as_one_rank() -> None:
    first, second = on_ranks(2, pipeline)
    for name, fuse_on, _ in RUNS:
        assert_same(first[name] | second[name], alone(2 * SCHEDULES[name][1], fuse_on))


@pytest.mark.processes
def test_a_sharded_stage_refuses_zero_bubbles() -> None:
    with pytest.raises(ProcessRaisedException, match="Take a schedule without zero bubbles"):
        on_ranks(2, pipeline, [("ZBV", "step", True)])
