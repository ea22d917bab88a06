"""A `Net` cut into stages of a torch pipeline over two ranks, or over two meshes of ranks."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

import exfusion_param as exf
from exfusion_param.tensors.shards import full_tensor
from exfusion_testing.step_models import Block, Net, batch

MICRO_BATCHES = 4
STEPS = 2
SIZE = 16
"""Samples of a batch."""

SCHEDULES: dict[str, tuple[Any, int]] = {
    "GPipe": (ScheduleGPipe, 1),
    "1F1B": (Schedule1F1B, 1),
    "LoopedBFS": (ScheduleLoopedBFS, 2),
    "Interleaved1F1B": (ScheduleInterleaved1F1B, 2),
    "InterleavedZeroBubble": (ScheduleInterleavedZeroBubble, 2),
    "ZBV": (ScheduleZBVZeroBubble, 2),
    "DualPipeV": (ScheduleDualPipeV, 2),
}
"""With the number of stages on each of the two ranks."""


def loss_of(y: Tensor, target: Tensor | None = None) -> Tensor:
    """A loss of a micro-batch, which needs no target."""
    return (y.square() + y.sin()).mean()


def wrapped(stage: nn.Module, variant: Any, fuse_on: Any, group: Any = None) -> nn.Module:
    """A stage that is wrapped alike on all ranks of its group."""
    settings = {"variant": variant, "fuse_on": fuse_on, "seed": 1, "bank_init": "uniform"}
    return exf.wrap(stage, process_group=group, **settings)


def stages(count: int, variant: str, fuse_on: str, group: Any = None) -> list[nn.Module]:
    """Two or four stages, each wrapped for itself."""
    torch.manual_seed(0)
    net = Net(depth=4)
    parts = [net.embed, *net.blocks, net.head]
    ends = {2: [0, 3, 6], 4: [0, 2, 3, 4, 6]}[count]
    made = [nn.Sequential(*parts[a:b]) for a, b in itertools.pairwise(ends)]
    return [wrapped(stage, variant, fuse_on, group) for stage in made]


def on_one_rank(
    count: int,
    variant: str,
    fuse_on: str,
    steps: Iterable[int] = range(STEPS),
    before: Callable[[dict[str, Any]], Any] = dict,
) -> dict[str, Tensor]:
    """The state by the names of stages, without a pipeline.

    Args:
        count: of stages.
        variant: of the fusion weights.
        fuse_on: when they fuse.
        steps: the number of each.
        before: is given the parts to save before the first one.
    """
    model = nn.Sequential(*stages(count, variant, fuse_on))
    optimizers = [torch.optim.SGD(stage.parameters(), lr=0.1) for stage in model]
    before(parts_to_save(dict(enumerate(model)), dict(enumerate(optimizers))))
    for step in steps:
        for part in batch(step, size=SIZE).chunk(MICRO_BATCHES):
            (loss_of(model(part)) / MICRO_BATCHES).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return dict(model.state_dict())


def parts_to_save(stages: Mapping[int, Any], optimizers: Mapping[int, Any]) -> dict[str, Any]:
    """Parts for `Checkpoints`: each stage and its optimizer under names of their own."""
    return {f"stage-{index}": stage for index, stage in stages.items()} | {
        f"optimizer-{index}": optimizer for index, optimizer in optimizers.items()
    }


class Pipeline:
    """This rank's stages, over two ranks, or two meshes of data-parallel ranks.

    Args:
        schedule: a name in `SCHEDULES`.
        variant: of the fusion weights.
        fuse_on: when they fuse.
        layout: "plain", or by FSDP2: "sharded" until the step ends, or "resharded" after each
            forward.
        data: the number of data-parallel ranks, unless it is plain.
    """

    def __init__(
        self, schedule: str, variant: str, fuse_on: str, layout: str, data: int = 1
    ) -> None:
        self._mesh = init_device_mesh("cpu", (2, data), mesh_dim_names=("stage", "data"))
        make, per_rank = SCHEDULES[schedule]
        rank, count = self._mesh.get_local_rank("stage"), 2 * per_rank
        is_v = schedule in ("ZBV", "DualPipeV")
        own = [rank, count - 1 - rank if is_v else rank + 2][:per_rank]
        every = stages(count, variant, fuse_on, self._mesh["data"])
        self.stages = {index: every[index] for index in own}
        if layout != "plain":
            for stage in self.stages.values():
                _shard(stage, self._mesh["data"], layout == "resharded")
        group = self._mesh.get_group("stage")
        made = [
            PipelineStage(stage, index, count, torch.device("cpu"), group=group)
            for index, stage in self.stages.items()
        ]
        self._schedule = make(made if per_rank > 1 else made[0], MICRO_BATCHES, loss_fn=loss_of)
        self.optimizers = {
            index: torch.optim.SGD(stage.parameters(), lr=0.1)
            for index, stage in self.stages.items()
        }
        self._is_first, self._is_last = rank == 0, count - 1 in own

    def train(self, steps: Iterable[int] = range(STEPS)) -> "Pipeline":
        """A step for each number, on this rank's samples of each micro-batch."""
        data = self._mesh["data"]
        for step in steps:
            parts = batch(step, size=SIZE).chunk(MICRO_BATCHES)
            x = torch.cat([part.chunk(data.size())[data.get_local_rank()] for part in parts])
            target = torch.zeros(len(x)) if self._is_last else None
            self._schedule.step(*([x] if self._is_first else []), target=target)
            for optimizer in self.optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
        return self

    def parts(self) -> dict[str, Any]:
        """What `Checkpoints` saves of this rank."""
        return parts_to_save(self.stages, self.optimizers)

    def state(self) -> dict[str, Tensor]:
        """The whole state of this rank's stages."""
        return {
            f"{index}.{key}": full_tensor(value).detach().clone()
            for index, stage in self.stages.items()
            for key, value in stage.state_dict().items()
        }


def _shard(stage: Any, mesh: Any, is_resharded: bool) -> None:
    how = {"shard_placement_fn": exf.expert_placement, "reshard_after_forward": is_resharded}
    for block in stage:
        if isinstance(block, Block):
            fully_shard(block, mesh=mesh, **how)
    fully_shard(stage, mesh=mesh, **how)
