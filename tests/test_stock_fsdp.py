"""FSDP2 and FSDP1 as torch has them, on models that fuse at each forward."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp import fully_shard as torch_fully_shard

import exfusion_param as exf
from exfusion_param.tensors.shards import full_tensor, local
from exfusion_testing.models import loss_of
from exfusion_testing.ranks import on_ranks, on_threads
from exfusion_testing.sharded import (
    BATCHES,
    assert_same,
    dense_model,
    mesh_of,
    my_part,
    settings_of,
    train,
    whole_state,
)

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*view tensor:UserWarning")


def by_stock_fsdp2(rank: int, dense: nn.Module, config: Any, placement: Any) -> Any:
    model = exf.wrap(copy.deepcopy(dense), config)
    for module in (*model.blocks, model):
        torch_fully_shard(module, mesh=mesh_of(2), shard_placement_fn=placement)
    train(model, my_part(rank, BATCHES, 2), 2)
    fused = {name: full_tensor(tensor) for name, tensor in exf.fused_state_dict(model).items()}
    return whole_state(model), fused, exf.metrics(model)


@pytest.mark.parametrize("placement", [None, exf.expert_placement])
@pytest.mark.parametrize("variant", ["sw", "dw", "mb"])
def test_stock_fsdp2_works_under_forward(placement: Any, variant: str) -> None:
    dense, config = dense_model(), settings_of("forward", variant)
    one = train(exf.wrap(copy.deepcopy(dense), config), BATCHES, 2)
    for state, fused, metrics in on_threads(2, by_stock_fsdp2, dense, config, placement):
        assert_same([state], one.state_dict())
        assert_same([fused], exf.fused_state_dict(one))
        assert metrics == pytest.approx(exf.metrics(one), rel=1e-6)


def placements(rank: int, dense: nn.Module, config: Any) -> list[tuple[int, ...]]:
    model = exf.wrap(copy.deepcopy(dense), config)
    torch_fully_shard(model, mesh=mesh_of(2), shard_placement_fn=exf.expert_placement)
    return [tuple(local(parameter).shape) for parameter in model.parameters()]


def test_expert_placement_keeps_the_experts_together() -> None:
    shapes = on_threads(2, placements, dense_model(), settings_of("forward", "sw"))[0]
    assert {(3, 3, 4), (3, 2, 6), (3, 3), (3, 2)} <= set(shapes)  # experts, half of out, in


def accumulate(model: nn.Module, batches: list[Tensor]) -> None:
    """Without clipping, for which FSDP1 has a method of its own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for batch in batches:
        for part in batch.chunk(2):
            (loss_of(model, part) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()


def by_fsdp1(rank: int, dense: nn.Module, configs: list[Any]) -> Any:
    states = []
    for config in configs:
        model = exf.wrap(copy.deepcopy(dense), config)
        wrapper = FullyShardedDataParallel(
            model, use_orig_params=True, device_id=torch.device("cpu")
        )
        accumulate(wrapper, my_part(rank, BATCHES, 2))
        with FullyShardedDataParallel.summon_full_params(wrapper):
            state = wrapper.module.state_dict()
            states.append({name: tensor.clone() for name, tensor in state.items()})
    return states


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:.*FSDP.*:FutureWarning")
def test_fsdp1_works_under_forward() -> None:
    dense = dense_model()
    configs = [settings_of("forward", variant) for variant in ("sw", "dw", "mb")]
    results = on_ranks(2, by_fsdp1, dense, configs)
    for config, *states in zip(configs, *results, strict=True):
        one = exf.wrap(copy.deepcopy(dense), config)
        accumulate(one, BATCHES)
        assert_same(states, one.state_dict())
