"""Training on k ranks with 1/k of the batch each is training on one rank: FSDP2, HSDP and DDP."""

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import exfusion_param as exf
from exfusion_param.tensors.ranks import all_ranks, sum_together
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.ranks import on_ranks, on_threads
from exfusion_testing.sharded import (
    MODES,
    VARIANTS,
    assert_same,
    mesh_of,
    my_part,
    train,
    whole_state,
)
from exfusion_testing.strategies import configs, hidden_sizes, sizes

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*view tensor:UserWarning")


def on_one_rank(
    dense: nn.Module, config: exf.ExFusionConfig, batches: list[Tensor], micro_batches: int = 1
) -> dict[str, Tensor]:
    return train(exf.wrap(copy.deepcopy(dense), config), batches, micro_batches).state_dict()


def fsdp2(
    rank: int,
    dense: nn.Module,
    config: exf.ExFusionConfig,
    batches: list[Tensor],
    shape: tuple[int, ...],
    micro_batches: int = 1,
) -> dict[str, Tensor]:
    model = exf.wrap(copy.deepcopy(dense), config)
    exf.fully_shard(model, mesh=mesh_of(*shape))
    return whole_state(train(model, my_part(rank, batches, micro_batches), micro_batches))


def ddp(
    rank: int,
    dense: nn.Module,
    config: exf.ExFusionConfig,
    batches: list[Tensor],
    shape: tuple[int, ...],
    micro_batches: int = 1,
) -> dict[str, Tensor]:
    model = exf.wrap(copy.deepcopy(dense), config)
    train(DistributedDataParallel(model), my_part(rank, batches, micro_batches), micro_batches)
    return model.state_dict()


@settings(max_examples=15)
@given(
    config=configs(),
    fuse_on=st.sampled_from(MODES),
    shape=st.sampled_from([(1,), (2,), (3,), (5,), (8,), (2, 2), (2, 3), (4, 2), (1, 2), (2, 1)]),
    dim=sizes,
    hidden=hidden_sizes,
    bias=st.booleans(),
    micro_batches=st.integers(1, 2),
)
def test_k_ranks_equal_one(
    config: exf.ExFusionConfig,
    fuse_on: Any,
    shape: tuple[int, ...],
    dim: int,
    hidden: int,
    bias: bool,
    micro_batches: int,
) -> None:
    config = config.replace(fuse_on=fuse_on)
    ranks = torch.Size(shape).numel()
    torch.manual_seed(0)
    dense = FFNs(dim, hidden, bias=bias).double()
    batches = [inputs(dim, batch=ranks * micro_batches, seed=seed) for seed in range(3)]
    expected = on_one_rank(dense, config, batches, micro_batches)
    assert_same(on_threads(ranks, fsdp2, dense, config, batches, shape, micro_batches), expected)


def with_each(
    rank: int, run: Any, dense: nn.Module, configs: list[exf.ExFusionConfig], *rest: Any
) -> list[dict[str, Tensor]]:
    return [run(rank, dense, config, *rest) for config in configs]


@pytest.mark.processes
@pytest.mark.parametrize("run", [ddp, fsdp2])
def test_processes_equal_one(run: Any) -> None:
    torch.manual_seed(0)
    dense = FFNs(5, 7).double()
    configs = [
        exf.ExFusionConfig().replace(variant=variant, fuse_on=fuse_on, num_experts=3, seed=1)
        for variant, fuse_on in itertools.product(VARIANTS, MODES)
    ]
    batches = [inputs(5, batch=8, seed=seed) for seed in range(3)]
    states = on_ranks(2, with_each, run, dense, configs, batches, (2,), 2)
    for config, *of_ranks in zip(configs, *states, strict=True):
        assert_same(of_ranks, on_one_rank(dense, config, batches, 2))


def count_reduced(rank: int, dense: nn.Module, config: exf.ExFusionConfig) -> int:
    ddp_model = DistributedDataParallel(exf.wrap(dense, config))
    counts: list[int] = []

    def count(
        state: object, bucket: torch.distributed.GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        counts.append(bucket.buffer().numel())
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    ddp_model.register_comm_hook(None, count)
    loss_of(ddp_model, inputs()).backward()
    return sum(counts)


@pytest.mark.processes
def test_ddp_reduces_the_gradients_of_the_dense_model_and_of_its_routers() -> None:
    dense = FFNs().double()
    config = exf.ExFusionConfig(fuse_on="step", num_experts=16, seed=1)
    routers = 2 * 16 * 4  # zeros, until the optimizer's step
    parameters = sum(parameter.numel() for parameter in dense.parameters()) + routers
    assert on_ranks(2, count_reduced, dense, config) == [parameters, parameters]


def parts_together(rank: int) -> list[Tensor]:
    parts = [torch.ones(2), torch.full((3,), 1 / 3 + rank, dtype=torch.float64), torch.ones(0)]
    return sum_together(all_ranks(), parts)


def test_parts_of_several_dtypes_are_summed_in_the_most_exact_one() -> None:
    for sums in on_threads(2, parts_together):
        assert [len(part) for part in sums] == [2, 3, 0]
        torch.testing.assert_close(sums[0], torch.full((2,), 2.0, dtype=torch.float64))
        exact = torch.full((3,), 2 / 3 + 1, dtype=torch.float64)
        torch.testing.assert_close(sums[1], exact, rtol=0, atol=1e-15)
