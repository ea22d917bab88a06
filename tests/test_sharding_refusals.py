"""What sharding refuses, and that it says so before it changes anything."""

import copy
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import exfusion_param as exf
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.ranks import on_ranks, on_threads
from exfusion_testing.sharded import mesh_of, my_part

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*view tensor:UserWarning")

SETTINGS = {"num_experts": 3, "seed": 1, "fuse_on": "step", "bank_init": "uniform"}
Attempt = Callable[[nn.Module, int], object]
BUILDING = threading.Lock()  # threads draw on one generator


def wrapped(**fields: Any) -> Any:
    with BUILDING:
        torch.manual_seed(0)
        model = FFNs().double()
    return exf.wrap(model, **(SETTINGS | fields))


def a_dense_model(model: nn.Module, rank: int) -> None:
    exf.fully_shard(exf.fuse(model), mesh=mesh_of(2))


def a_sharded_model(model: nn.Module, rank: int) -> None:
    torch_fully_shard(model, mesh=mesh_of(2))
    exf.fully_shard(model, mesh=mesh_of(2))


def a_mesh_of_three_dimensions(model: nn.Module, rank: int) -> None:
    exf.fully_shard(model, mesh=init_device_mesh("cpu", (1, 1, 2)))


def a_mesh_of_others(model: nn.Module, rank: int) -> None:
    mesh = DeviceMesh("cpu", [0])
    if rank == 0:
        raise ValueError("Rank 0 is in the mesh")
    exf.fully_shard(model, mesh=mesh)


def a_mesh_without_names(model: nn.Module, rank: int) -> None:
    exf.fully_shard(model, mesh=init_device_mesh("cpu", (1, 2)))


def a_block_of_another_model(model: nn.Module, rank: int) -> None:
    exf.fully_shard(model, mesh=mesh_of(2), blocks=[wrapped().blocks[0]])


def one_block_sharded(model: Any, rank: int) -> None:
    torch_fully_shard(model.blocks[1], mesh=mesh_of(2))
    exf.fully_shard(model, mesh=mesh_of(2))


def a_container(model: Any, rank: int) -> None:
    exf.fully_shard(nn.ModuleDict({"student": model}), mesh=mesh_of(2))


def a_container_as_block(model: Any, rank: int) -> None:
    exf.fully_shard(model, mesh=mesh_of(2), blocks=[model.blocks])


def a_placement_of_stacks(model: nn.Module, rank: int) -> None:
    other = wrapped(fuse_on="forward")
    exf.fully_shard(other, mesh=mesh_of(2), shard_placement_fn=lambda p: Shard(0))


def mesh_dimensions_by_name(model: nn.Module, rank: int) -> None:
    dims = fsdp.DataParallelMeshDims(shard="shard")  # not in torch 2.11
    exf.fully_shard(wrapped(fuse_on="forward"), mesh=mesh_of(2), dp_mesh_dims=dims)


def another_seed(model: nn.Module, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    other = wrapped(seed=None, generator=generator, fuse_on="forward")
    exf.fully_shard(other, mesh=mesh_of(2))


def another_momentum(model: nn.Module, rank: int) -> None:
    exf.fully_shard(wrapped(momentum=0.5 + 0.1 * rank, fuse_on="forward"), mesh=mesh_of(2))


def fewer_blocks(model: nn.Module, rank: int) -> None:
    depth = 2 - rank
    exf.fully_shard(exf.wrap(FFNs(depth=depth), num_experts=3, seed=1), mesh=mesh_of(2))


def wrap_after_sharding(model: nn.Module, rank: int) -> None:
    exf.wrap(torch_fully_shard(FFNs(), mesh=mesh_of(2)))


def fuse_while_sharded(model: nn.Module, rank: int) -> None:
    exf.fuse(exf.fully_shard(model, mesh=mesh_of(2)))


REFUSALS = [
    (a_dense_model, "has no wrapped linear. Call wrap"),
    (a_sharded_model, "is already sharded .all of it"),
    (a_mesh_of_three_dimensions, "mesh must have one dimension .* got 3"),
    (a_mesh_of_others, "Rank 1 is not in the mesh|Rank 0 is in the mesh"),
    (a_mesh_without_names, "needs names for FSDP2"),
    (a_block_of_another_model, "blocks has a Mlp that is not in the model"),
    (one_block_sharded, "is already sharded .blocks.1"),
    (a_container, "cannot shard ModuleDict, which has no forward"),
    (a_container_as_block, "cannot shard ModuleList, which has no forward"),
    (a_placement_of_stacks, "gives Shard.dim=0. for 'blocks.0.*an expert stack .* Return None"),
    (mesh_dimensions_by_name, "dp_mesh_dims needs fuse_on=.step"),
    (another_seed, "Rank 1 wrapped the model differently .* 'blocks.0' differs in its experts"),
    (another_momentum, "Rank 1 wrapped .* differently .* 'blocks.0' differs in its settings"),
    (fewer_blocks, "Rank 1 wrapped the model differently .* 'blocks.[01]' differs in"),
    (wrap_after_sharding, "sharded .DTensor.. Wrap first, shard after"),
    (fuse_while_sharded, "sharded .DTensor.. Take fused_state_dict"),
]


def attempt(rank: int, function: Attempt) -> str:
    model = wrapped()
    try:
        function(model, rank)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(("function", "message"), REFUSALS)
def test_every_rank_refuses(function: Attempt, message: str) -> None:
    for said in on_threads(2, attempt, function):
        with pytest.raises(ValueError, match=message):
            raise ValueError(said)


def state_after_a_refusal(rank: int) -> bool:
    model = wrapped()
    before = copy.deepcopy(model.state_dict())
    types = [type(module) for module in model.modules()]
    dims = itertools.chain([None] * 7, itertools.repeat(Shard(1)))  # the last is found late
    calls: list[dict[str, Any]] = [
        {"blocks": [nn.Linear(1, 1)]},
        {"blocks": [model.blocks[0], model.blocks]},
        {"shard_placement_fn": lambda parameter: next(dims)},
    ]
    for settings in calls:
        with pytest.raises(ValueError, match=r"not in the model|no forward|does not fit"):
            exf.fully_shard(model, mesh=mesh_of(4), **settings)
    after = model.state_dict()
    return types == [type(module) for module in model.modules()] and all(
        torch.equal(tensor, after[name]) for name, tensor in before.items()
    )


def test_a_refusal_leaves_the_model_as_it_was() -> None:
    assert all(on_threads(4, state_after_a_refusal))


def step_error(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> str:
    try:
        loss_of(model, my_part(rank, [inputs()])[0]).backward()
        optimizer.step()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "no error"


def with_an_early_optimizer(rank: int) -> str:
    model = wrapped()
    optimizer = torch.optim.AdamW(model.parameters())
    exf.fully_shard(model, mesh=mesh_of(2))
    return step_error(model, optimizer, rank)


def with_other_settings(rank: int) -> str:
    model = wrapped(momentum=0.5 + 0.1 * rank)
    torch_fully_shard(model, mesh=mesh_of(2))
    return step_error(model, torch.optim.AdamW(model.parameters()), rank)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (with_an_early_optimizer, "AdamW was made before fully_shard"),
        (with_other_settings, "Rank 1 wrapped the model differently from rank 0: 'blocks.0"),
    ],
)
def test_the_first_step_refuses(function: Any, message: str) -> None:
    assert all(message in said for said in on_threads(2, function))


def in_processes(rank: int) -> dict[str, str]:
    other = wrapped(seed=rank, fuse_on="forward")
    ddp = DistributedDataParallel(other)
    said = {"ddp": step_error(ddp, torch.optim.AdamW(other.parameters()), rank)}
    flat = FullyShardedDataParallel(wrapped(), use_orig_params=True, device_id=torch.device("cpu"))
    return said | {"fsdp1": step_error(flat, torch.optim.AdamW(flat.parameters()), rank)}


@pytest.mark.processes
def test_ddp_with_different_seeds_and_fsdp1_are_refused() -> None:
    for said in on_ranks(2, in_processes):
        assert "Rank 1 wrapped the model differently from rank 0: 'blocks.0.fc1'" in said["ddp"]
        assert "flat parameters, as under FSDP1" in said["fsdp1"]
