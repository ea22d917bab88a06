"""What the tests of training on several ranks share."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import exfusion_param as exf
from exfusion_param.tensors.shards import full_tensor
from exfusion_testing.models import FFNs, inputs, loss_of

VARIANTS = ["sw", "dw", "mb"]
MODES = ["forward", "step"]
EXACT = {"rtol": 0, "atol": 1e-9}
BATCHES = [inputs(batch=8, seed=seed) for seed in range(4)]


def mesh_of(*shape: int) -> DeviceMesh:
    """A mesh of shards, or of replicas and shards."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def my_part(rank: int, batches: Iterable[Tensor], micro_batches: int = 1) -> list[Tensor]:
    """This rank's samples of each batch, as many of each micro-batch."""
    ranks = distributed.get_world_size()
    return [
        torch.cat([part.chunk(ranks)[rank] for part in batch.chunk(micro_batches)])
        for batch in batches
    ]


def train(model: nn.Module, batches: Iterable[Tensor], micro_batches: int = 1) -> nn.Module:
    """SGD, which shows a gradient of the wrong scale, clipped; a step for each batch."""
    optimizer = torch.optim.SGD(exf.param_groups(model, 0.1), lr=0.2, momentum=0.9)
    for batch in batches:
        for part in batch.chunk(micro_batches):
            (loss_of(model, part) / micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return model


def set_environment(rank: int, ranks: int) -> None:
    """What torchrun sets, for trainers that join a group which exists."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in values.items()})
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # unused


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, gathered on each rank."""
    return {name: full_tensor(tensor).clone() for name, tensor in model.state_dict().items()}


def assert_same(
    states: Iterable[dict[str, Tensor]], expected: dict[str, Tensor], atol: float = EXACT["atol"]
) -> None:
    """Every state is the expected one, in float64."""
    for state in states:
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=atol, msg=name)


def settings_of(fuse_on: Any, variant: Any = "mb") -> exf.ExFusionConfig:
    """Three experts."""
    return exf.ExFusionConfig(
        variant=variant, fuse_on=fuse_on, num_experts=3, bank_init="uniform", seed=1
    )


def dense_model() -> nn.Module:
    """FFNs in float64."""
    torch.manual_seed(0)
    return FFNs().double()
