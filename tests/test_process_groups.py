"""Several models in one job: each is reduced over its own ranks, and equals one rank."""

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed._composable import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import exfusion_param as exf
from exfusion_param.tensors import arrival
from exfusion_param.tensors.ranks import ALONE
from exfusion_param.tensors.shards import full_tensor
from exfusion_testing.ranks import on_ranks, on_threads
from exfusion_testing.step_models import (
    VARIANTS,
    Net,
    adamw,
    assert_same,
    batch,
    fusion_weights,
    loss_of,
)

MODES = ["forward", "step"]


def wrapped(seed: int, variant: Any, fuse_on: Any, group: Any = None) -> Any:
    torch.manual_seed(seed)
    settings = {"variant": variant, "fuse_on": fuse_on, "seed": seed, "bank_init": "uniform"}
    return exf.wrap(Net(), process_group=group, **settings)


def train(model: nn.Module, inner: Any, data: int, part: int = 0, parts: int = 1) -> Any:
    """Two steps on data of a model's own; the state as on one rank."""
    optimizer = adamw(model)
    for step in range(2):
        loss_of(model, batch(10 * data + step, size=8).chunk(parts)[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: full_tensor(value).detach().clone() for name, value in inner.state_dict().items()}


ENGINES = {
    "DDP": lambda model, group: DistributedDataParallel(model, process_group=group),
    "replicate": lambda model, group: replicate(model, process_group=group),
    "FSDP2": lambda model, group: sharded(model, DeviceMesh.from_group(group, "cpu")),
}


def sharded(model: Any, mesh: DeviceMesh) -> Any:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=exf.expert_placement)
    return fully_shard(model, mesh=mesh)


def has_to_be_given(engine: str, variant: str, fuse_on: str) -> bool:
    """Under "forward" only a memory bank looks for the ranks of DDP before the first step."""
    return fuse_on == "forward" and (variant != "mb" or engine == "FSDP2")


def two_models(rank: int) -> dict[str, Any]:
    """Ranks 0 and 2 train one model, 1 and 3 another, by data parallelism."""
    groups: list[Any] = [distributed.new_group([0, 2]), distributed.new_group([1, 3])]
    group = groups[rank % 2]
    states = {}
    for engine, variant, fuse_on in itertools.product(ENGINES, VARIANTS, MODES):
        is_given = has_to_be_given(engine, variant, fuse_on)
        inner = wrapped(rank % 2, variant, fuse_on, group if is_given else None)
        model = ENGINES[engine](inner, group)
        key = f"{engine}/{variant}/{fuse_on}"
        states[key] = train(model, inner, rank % 2, rank // 2, 2)
    return states


@pytest.mark.processes
def test_two_models_in_two_groups_of_ranks_each_equal_one_rank() -> None:
    for rank, states in enumerate(on_ranks(4, two_models)):
        for key, state in states.items():
            _, variant, fuse_on = key.split("/")
            alone = wrapped(rank % 2, variant, fuse_on)
            assert_same(state, train(alone, alone, rank % 2))


def with_a_server(rank: int, is_given: bool) -> Any:
    """Ranks 0 and 1 train; rank 2 waits for their result, as a parameter server does."""
    group: Any = distributed.new_group([0, 1])
    arrival.PATIENCE["optimizer step"] = 2.0
    if rank < 2:
        # By hand, so that nothing tells the group but the argument.
        inner = wrapped(0, "mb", "step", group if is_given else None)
        optimizer = adamw(inner)
        try:
            for step in range(2):
                loss_of(inner, batch(step, size=8).chunk(2)[rank]).backward()
                for parameter in inner.parameters():
                    distributed.all_reduce(parameter.grad, group=group)
                    parameter.grad /= 2
                optimizer.step()
                optimizer.zero_grad()
        except RuntimeError as error:
            return str(error)
    distributed.barrier()
    return inner.state_dict() if rank < 2 else {}


@pytest.mark.processes
def test_a_rank_that_does_not_train_takes_no_part() -> None:
    alone = wrapped(0, "mb", "step")
    train_alone = adamw(alone)
    for step in range(2):
        loss_of(alone, batch(step, size=8)).backward()
        train_alone.step()
        train_alone.zero_grad()
    for state in on_ranks(3, with_a_server, True)[:2]:
        assert_same(state, dict(alone.state_dict()))


def late(rank: int) -> list[str]:
    arrival.PATIENCE["optimizer step"] = arrival.PATIENCE["forward"] = 0.5
    messages: list[str] = []
    for variant, fuse_on in [("dw", "step"), ("mb", "forward")] if rank < 2 else []:
        model = wrapped(0, variant, fuse_on)
        with pytest.raises(RuntimeError) as caught:
            train(model, model, 0)
        messages.append(str(caught.value))
    return messages


@pytest.mark.processes
def test_ranks_that_wait_for_one_that_does_not_train_raise() -> None:
    for at_step, in_forward in on_ranks(3, late)[:2]:
        assert "and of these 2 did not come to their first optimizer step within" in at_step
        assert "the ranks 0, 1, 2, and of these 2 did not come to their first forward" in in_forward
        assert "wrap(..., process_group=group)" in in_forward


def other_models(rank: int, kind: str) -> str:
    """Stages of one pipeline, or two models, whose ranks were not told apart."""
    seed = rank if kind == "weights" else 0
    model = wrapped(seed, "mb", "step")
    if kind == "names":
        model = exf.wrap(nn.Sequential(Net().blocks[rank] if rank else Net()), fuse_on="step")
    x = torch.ones(2, 8 if kind == "names" and rank else 6, dtype=torch.float64)
    loss_of(model, x).backward()
    with pytest.raises(ValueError, match="differently") as caught:
        adamw(model).step()
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "what"), [("names", "being wrapped at all"), ("weights", "its weights")]
)
def test_models_that_differ_are_refused_on_all_ranks(kind: str, what: str) -> None:
    for message in on_threads(2, other_models, kind):
        assert f"differs in {what}" in message
        assert "wrap(..., process_group=group)" in message


def copies(rank: int) -> list[Any]:
    group: Any = distributed.new_group([0, 1])
    model = wrapped(0, "mb", "step", group)
    copied = copy.deepcopy(model)
    shared = [weights.ranks.groups for weights in [*fusion_weights(model), *fusion_weights(copied)]]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with pytest.raises(RuntimeError) as caught:
        fusion_weights(loaded)[0].ranks  # noqa: B018
    again = wrapped(1, "mb", "step", group)
    again.load_state_dict(loaded.state_dict())
    return [all(groups == (group,) for groups in shared), str(caught.value)]


@pytest.mark.processes
def test_a_copy_has_the_process_group_and_a_pickle_asks_for_one() -> None:
    for is_shared, message in on_ranks(2, copies):
        assert is_shared
        assert "The model of 'blocks.0' was unpickled" in message


def alone_in_its_group(rank: int) -> bool:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("stage", "data"))
    model = wrapped(rank, "mb", "step", mesh["data"])
    loaded = pickle.loads(pickle.dumps(model))
    return all(w.ranks is ALONE for w in [*fusion_weights(model), *fusion_weights(loaded)])


def test_a_group_of_one_rank_needs_no_other() -> None:
    assert all(on_threads(2, alone_in_its_group))


def refused(rank: int) -> list[str]:
    messages = []
    for group in (distributed.new_group([1 - rank]), "data"):
        with pytest.raises((TypeError, ValueError)) as caught:
            wrapped(0, "dw", "step", group)
        messages.append(str(caught.value))
    return messages


@pytest.mark.processes
def test_groups_that_cannot_be_meant_are_refused() -> None:
    for rank, (other, word) in enumerate(on_ranks(2, refused)):
        assert f"Rank {rank} is not in process_group" in other
        assert "must be a ProcessGroup or a DeviceMesh, got str" in word
    with pytest.raises(ValueError, match="init_process_group"):
        wrapped(0, "dw", "step", "data")
