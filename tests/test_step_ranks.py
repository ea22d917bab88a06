"""Training loops of public DDP scripts, with `wrap` as the only addition."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from exfusion_param.tensors.shards import full_tensor
from exfusion_testing.ranks import on_ranks
from exfusion_testing.step_models import VARIANTS, Net, adamw, assert_same, batch, loss_of, wrap

pytestmark = pytest.mark.processes


def loop(model: nn.Module, rank: int, ranks: int, steps: int = 4) -> None:
    optimizer = adamw(model)
    for step in range(steps):
        part = batch(step, size=8).chunk(ranks)[rank]
        loss_of(model, part).backward()
        optimizer.step()
        optimizer.zero_grad()


def with_seeds_by_rank(rank: int, variant: str) -> dict[str, Tensor]:
    """As nanoGPT, timm, DeiT, MAE, ConvNeXt and DiT: the ranks build from seeds of their own."""
    torch.manual_seed(100 + rank)
    model = wrap(Net(), variant, seed=None)
    loop(DistributedDataParallel(model), rank, 2)
    return model.state_dict()


def with_one_seed(rank: int, variant: str) -> dict[str, Tensor]:
    torch.manual_seed(100)
    model = wrap(Net(), variant, seed=None)
    loop(DistributedDataParallel(model), rank, 2)
    return model.state_dict()


def compiled_inside(rank: int, variant: str) -> dict[str, Tensor]:
    torch.manual_seed(100)
    model = wrap(Net(), variant, seed=None)
    loop(DistributedDataParallel(torch.compile(model, backend="aot_eager")), rank, 2)
    return model.state_dict()


class Dropped(Net):
    """Drops its first block at the first step."""

    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks[1 if self.steps == 0 else 0 :]:
            x = block(x)
        self.steps += 1
        return self.head(x)


def with_unused_parameters(rank: int, variant: str) -> dict[str, Tensor]:
    torch.manual_seed(100)
    model = wrap(Dropped(), variant, seed=None)
    loop(DistributedDataParallel(model, find_unused_parameters=True), rank, 2)
    return model.state_dict()


def with_ignored_overwritten(rank: int, variant: str) -> dict[str, Tensor]:
    torch.manual_seed(100 + rank)
    model: Any = wrap(Net(), variant, seed=None)
    names = ["head.bias"]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    with torch.no_grad():
        model.head.bias.zero_()
    loop(DistributedDataParallel(model), rank, 2)
    model.head.bias.data.zero_()
    return model.state_dict()


def without_sync(rank: int, variant: str) -> dict[str, Tensor]:
    torch.manual_seed(100)
    model = wrap(Net(), variant, seed=None)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = adamw(model)
    for step in range(4):
        first, second = batch(step, size=8).chunk(2)[rank].chunk(2)
        with ddp.no_sync():
            (loss_of(ddp, first) / 2).backward()
        (loss_of(ddp, second) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def alone(variant: str, kind: Any = Net) -> dict[str, Tensor]:
    torch.manual_seed(100)
    model = wrap(kind(), variant, seed=None)
    loop(model, 0, 1)
    return model.state_dict()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("script", [with_one_seed, with_seeds_by_rank, without_sync])
def test_two_ranks_train_as_one(variant: str, script: Any) -> None:
    first, second = on_ranks(2, script, variant)
    assert_same(first, second, 0)
    assert_same(first, alone(variant), 1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_stay_equal_if_ddp_ignores_the_users_settings(variant: str) -> None:
    first, second = on_ranks(2, with_ignored_overwritten, variant)
    assert_same(first, second, 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_that_are_dropped_at_the_first_step_train_as_on_one_rank(variant: str) -> None:
    first, second = on_ranks(2, with_unused_parameters, variant)
    assert_same(first, second, 0)
    assert_same(first, alone(variant, Dropped), 1e-9)


@pytest.mark.compiled
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_that_is_compiled_inside_of_ddp_trains_as_one_rank(variant: str) -> None:
    first, second = on_ranks(2, compiled_inside, variant)
    assert_same(first, second, 0)
    assert_same(first, alone(variant), 1e-9)


def with_an_empty_rank(rank: int) -> dict[str, Tensor]:
    """Rank 1 has no sample at every other step, so that only rank 0 has votes."""
    torch.manual_seed(0)
    model = wrap(Net(), "mb")
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = adamw(model)
    for step in range(3):
        part = batch(step, size=8)
        part = part[:0] if rank == 1 and step % 2 == 0 else part
        (model(part).square().sum() / 8).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: full_tensor(value).detach().clone() for name, value in model.state_dict().items()}


def test_a_bank_moves_alike_where_a_rank_has_no_sample() -> None:
    first, second = on_ranks(2, with_an_empty_rank)
    assert_same(first, second, 0)
