"""Ranks that differ: weights that the first one has, data that some have; FSDP2's replicas."""

from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import exfusion_param as exf
from exfusion_param.tensors.shards import assign
from exfusion_testing.models import inputs, loss_of
from exfusion_testing.ranks import on_threads
from exfusion_testing.sharded import (
    BATCHES,
    MODES,
    assert_same,
    dense_model,
    mesh_of,
    my_part,
    settings_of,
    train,
    whole_state,
)

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*view tensor:UserWarning")
VARIANTS = ["dw", "mb"]  # under "sw" no difference of experts is seen


def loaded_on_the_first(rank: int, model: Any, variant: str) -> dict[str, Tensor]:
    """As accelerate's cpu_ram_efficient_loading: other ranks have zeros until FSDP2 shards."""
    if rank > 0:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    exf.wrap(model, settings_of("step", variant))
    values = [{name: value.clone() for name, value in model.state_dict().items()}]
    distributed.broadcast_object_list(values, src=0)
    mesh = mesh_of(2)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            assign(tensor, values[0][name])
    return whole_state(train(model, my_part(rank, BATCHES)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_that_only_the_first_rank_has_loaded(variant: str) -> None:
    model = exf.wrap(dense_model(), settings_of("step", variant))
    expected = train(model, BATCHES).state_dict()
    models = [dense_model(), dense_model()]
    states = on_threads(2, lambda rank: loaded_on_the_first(rank, models[rank], variant))
    assert_same(states, expected)


def by_replicate(rank: int, model: Any) -> dict[str, Tensor]:
    mesh = mesh_of(2)
    for block in model.blocks:
        replicate(block, mesh=mesh)
    return whole_state(train(replicate(model, mesh=mesh), my_part(rank, BATCHES)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fuse_on", MODES)
def test_replicas_of_fsdp2_equal_one_rank(fuse_on: str, variant: str) -> None:
    settings = settings_of(fuse_on, variant)
    expected = train(exf.wrap(dense_model(), settings), BATCHES).state_dict()
    models = [exf.wrap(dense_model(), settings) for _ in range(2)]
    states = on_threads(2, lambda rank: by_replicate(rank, models[rank]))
    assert_same(states, expected)


@pytest.mark.parametrize(
    ("fuse_on", "variant"), [("step", "dw"), ("step", "mb"), ("forward", "mb")]
)
def test_ranks_that_run_out_of_data_are_refused(fuse_on: str, variant: str) -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = exf.wrap(dense_model(), settings_of(fuse_on, variant))
        ranks = DistributedDataParallel(model)
        loss_of(ranks, inputs()).backward()
        with (
            pytest.raises(RuntimeError, match=r'join\(\).* as many batches, or .* variant="sw"'),
            ranks.join(),
        ):
            ranks(inputs())
        static = DistributedDataParallel(exf.wrap(dense_model(), settings_of("step", "sw")))
        with static.join():
            loss_of(static, inputs()).backward()
    finally:
        distributed.destroy_process_group()
