"""Engines that train a wrapped `Net` on several ranks, to be compared with one rank."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed._composable import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import exfusion_param as exf
from exfusion_param.finding.outer_modules import unwrapped
from exfusion_param.tensors.shards import full_tensor
from exfusion_testing.pipelines import SCHEDULES, Pipeline, on_one_rank
from exfusion_testing.step_models import Net, batch, loss_of

STEPS, SIZE = 2, 8
State = dict[str, Tensor]


class Engine(NamedTuple):
    """A way to train on several ranks.

    Args:
        ranks: how many.
        train: gives the whole state, or this rank's stages', for a rank, a variant and `fuse_on`.
        alone: the same on one rank.
    """

    ranks: int
    train: Callable[[int, str, str], State]
    alone: Callable[[str, str], State]


def net(seed: int = 0) -> Net:
    """The dense model, alike on all ranks."""
    torch.manual_seed(seed)
    return Net()


def wrap(model: Any, variant: Any, fuse_on: Any, group: Any = None) -> Any:
    """Wrapped alike on all ranks."""
    settings = {"variant": variant, "fuse_on": fuse_on, "seed": 1, "bank_init": "uniform"}
    return exf.wrap(model, process_group=group, **settings)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """It shows a gradient of the wrong scale."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(
    model: Any, part: int = 0, parts: int = 1, make_optimizer: Any = sgd, data: int = 0
) -> State:
    """The state after steps on one of several equal parts of each batch."""
    optimizer = make_optimizer(model)
    for step in range(STEPS):
        loss_of(model, batch(10 * data + step, SIZE).chunk(parts)[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
    is_flat = isinstance(model, FullyShardedDataParallel)
    gathered = FullyShardedDataParallel.summon_full_params(model) if is_flat else nullcontext()
    with gathered:
        state = unwrapped(model).state_dict()
        return {
            name.replace("_fsdp_wrapped_module.", ""): full_tensor(tensor).detach().clone()
            for name, tensor in state.items()
        }


def alone(variant: str, fuse_on: str) -> State:
    """One rank."""
    return train(wrap(net(), variant, fuse_on))


def both_orders(name: str, ranks: int, make: Callable[[Any], Any], parts: int) -> dict[str, Engine]:
    """An engine that is given the wrapped model, and one whose model is wrapped."""

    def wrap_first(rank: int, variant: str, fuse_on: str) -> State:
        model = make(wrap(net(), variant, fuse_on))
        return train(model, rank * parts // ranks, parts)

    def wrap_last(rank: int, variant: str, fuse_on: str) -> State:
        model = wrap(make(net()), variant, fuse_on)
        return train(model, rank * parts // ranks, parts)

    return {
        f"wrap, then {name}": Engine(ranks, wrap_first, alone),
        f"{name}, then wrap": Engine(ranks, wrap_last, alone),
    }


def sharded(model: Any, mesh: Any) -> Any:
    """By torch's FSDP2, block by block."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=exf.expert_placement)
    return fully_shard(model, mesh=mesh, shard_placement_fn=exf.expert_placement)


def fsdp2(model: Any) -> Any:
    """On two ranks."""
    return sharded(model, init_device_mesh("cpu", (2,)))


def hsdp(model: Any) -> Any:
    """Two replicas of two shards."""
    return sharded(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def ours(model: Any) -> Any:
    """The package's own call."""
    return exf.fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


def fsdp1(model: Any) -> Any:
    """The first FSDP, with parameters of their own."""
    return FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=True, sync_module_states=False
    )


def tensor_parallel(model: Any, mesh: Any) -> Any:
    """Both linears of each FFN."""
    for block in model.blocks:
        parallelize_module(block, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    return model


def tp(model: Any) -> Any:
    """On two ranks."""
    return tensor_parallel(model, init_device_mesh("cpu", (2,)))


def tp_fsdp2(model: Any) -> Any:
    """FSDP2 over tensor parallelism."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return sharded(tensor_parallel(model, mesh["tensor"]), mesh["data"])


def tp_of_others(model: Any) -> Any:
    """FSDP2 over tensor parallelism of linears that are not of an FFN."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"embed": ColwiseParallel(output_layouts=Replicate())}
    return sharded(parallelize_module(model, mesh["tensor"], plan), mesh["data"])


def zero1(rank: int, variant: str, fuse_on: str) -> State:
    """DDP, and the optimizer's state over the ranks."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns

    def parted(model: nn.Module) -> Any:
        kind = torch.optim.SGD
        return ZeroRedundancyOptimizer(model.parameters(), kind, lr=0.1, momentum=0.9)

    return train(DistributedDataParallel(wrap(net(), variant, fuse_on)), rank, 2, parted)


def two_models(rank: int, variant: str, fuse_on: str) -> State:
    """Ranks 0 and 2 train one model under DDP, ranks 1 and 3 another."""
    group: Any = [distributed.new_group([0, 2]), distributed.new_group([1, 3])][rank % 2]
    inner = wrap(net(rank % 2), variant, fuse_on, group)
    model = DistributedDataParallel(inner, process_group=group)
    return {
        f"{rank % 2}.{name}": tensor
        for name, tensor in train(model, rank // 2, 2, data=rank % 2).items()
    }


def two_alone(variant: str, fuse_on: str) -> State:
    """Each on one rank."""
    return {
        f"{data}.{name}": tensor
        for data in range(2)
        for name, tensor in train(wrap(net(data), variant, fuse_on), data=data).items()
    }


def pipeline(schedule: str, layout: str) -> Engine:
    """Stages on two ranks, or under FSDP2 on four."""
    data = 1 if layout == "plain" else 2

    def train_stages(rank: int, variant: str, fuse_on: str) -> State:
        return Pipeline(schedule, variant, fuse_on, layout, data).train().state()

    def stages_alone(variant: str, fuse_on: str) -> State:
        return on_one_rank(2 * SCHEDULES[schedule][1], variant, fuse_on)

    return Engine(2 * data, train_stages, stages_alone)


ENGINES: dict[str, Engine] = (
    both_orders("DDP", 2, DistributedDataParallel, 2)
    | both_orders("`replicate`", 2, replicate, 2)
    | both_orders("FSDP2", 2, fsdp2, 2)
    | both_orders("`exf.fully_shard`", 2, ours, 2)
    | both_orders("HSDP", 4, hsdp, 4)
    | both_orders("FSDP1", 2, fsdp1, 2)
    | both_orders("tensor parallelism", 2, tp, 1)
    | both_orders("tensor parallelism and FSDP2", 4, tp_fsdp2, 2)
    | both_orders("tensor parallelism of other linears and FSDP2", 4, tp_of_others, 2)
    | {"wrap, then DDP and ZeRO-1": Engine(2, zero1, alone)}
    | {"two models, each under DDP": Engine(4, two_models, two_alone)}
    | {f"pipeline, {schedule}": pipeline(schedule, "plain") for schedule in SCHEDULES}
    | {
        f"pipeline, {schedule}, FSDP2 in each stage": pipeline(schedule, "sharded")
        for schedule in SCHEDULES
    }
)
