"""Banks under FSDP2 count the same as unsharded: discarded gradients, frozen phases, others.

FSDP2 is the stock one, and `exf.fully_shard`, which follows sharded parameters from the start.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard

import exfusion_param as exf
from exfusion_param.tensors.shards import full_tensor
from exfusion_testing.ranks import on_threads
from exfusion_testing.sharded import MODES, mesh_of
from exfusion_testing.step_models import Net, assert_same, batch, loss_of

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*view tensor:UserWarning")

RANKS = 2
Models = tuple[Any, nn.Linear]


def build(fuse_on: Any) -> Models:
    """A wrapped discriminator, and a generator."""
    torch.manual_seed(0)
    settings = {"variant": "mb", "fuse_on": fuse_on, "seed": 1, "bank_init": "uniform"}
    return exf.wrap(Net(), **settings), nn.Linear(6, 6).double()


def stock(model: Any) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=mesh_of(RANKS), shard_placement_fn=exf.expert_placement)
    fully_shard(model, mesh=mesh_of(RANKS))


def ours(model: Any) -> None:
    exf.fully_shard(model, mesh=mesh_of(RANKS))


class Loop:
    """A loop on all of the data, or on this rank's part of it.

    Args:
        models: as `build` gives them.
        rank: this one.
        ranks: how many there are.
    """

    def __init__(self, models: Models, rank: int, ranks: int) -> None:
        self.model, self.generator = models
        self.rank, self.ranks = rank, ranks
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.other = torch.optim.SGD(self.generator.parameters(), lr=0.1)

    def batch(self, seed: int) -> Tensor:
        """Its part of a batch."""
        return batch(seed, size=8).chunk(self.ranks)[self.rank]

    def backward(self, x: Tensor) -> None:
        loss_of(self.model, x).backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step_generator(self) -> None:
        for parameter in self.generator.parameters():
            if self.ranks > 1:
                distributed.all_reduce(parameter.grad)
                parameter.grad /= self.ranks  # type: ignore[operator]
        self.other.step()
        self.other.zero_grad()


def gan(loop: Loop, step: int) -> None:
    """The discriminator is frozen while the generator learns from it."""
    loop.model.requires_grad_(False)
    loop.backward(loop.generator(loop.batch(step)))
    loop.step_generator()
    loop.model.requires_grad_(True)
    loop.backward(loop.batch(step))
    loop.backward(loop.generator(loop.batch(step)).detach())
    loop.step()


def gan_that_resets(loop: Loop, step: int) -> None:
    """What the generator's loss gives to the discriminator is thrown away."""
    loop.optimizer.zero_grad()
    loop.backward(loop.batch(step))
    loop.optimizer.step()
    loop.backward(loop.generator(loop.batch(step)))
    loop.step_generator()


def phases(loop: Loop, step: int) -> None:
    loop.model.blocks[1].requires_grad_(step % 2 == 0)
    loop.backward(loop.batch(step))
    loop.step()


def resets(loop: Loop, step: int) -> None:
    for micro_batch in range(3):
        loop.backward(loop.batch(10 * step + micro_batch))
        if micro_batch == 0:
            loop.optimizer.zero_grad(set_to_none=step % 2 == 0)
    loop.step()


def aside(loop: Loop, step: int) -> None:
    """A gradient beside the loss, as for a saliency map."""
    x = loop.batch(100 + step).requires_grad_()
    torch.autograd.grad(loss_of(loop.model, x), x)
    loop.backward(loop.batch(step))
    loop.step()


def without_sync(loop: Loop, step: int) -> None:
    for micro_batch in range(3):
        if loop.ranks > 1:
            loop.model.set_requires_gradient_sync(micro_batch == 2)
        loop.backward(loop.batch(10 * step + micro_batch))
    loop.step()


def state_after(rank: int, models: list[Models], shard: Any, do: Any) -> dict[str, Tensor]:
    model = models[rank][0]
    if shard is not None:
        shard(model)
    loop = Loop(models[rank], rank, len(models))
    for step in range(4):
        do(loop, step)
    return {name: full_tensor(value).detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("fuse_on", MODES)
@pytest.mark.parametrize("shard", [stock, ours])
@pytest.mark.parametrize("do", [gan, gan_that_resets, phases, resets, aside, without_sync])
def test_banks_are_those_of_one_rank(
    do: Callable[[Loop, int], None], shard: Callable[[Any], None], fuse_on: str
) -> None:
    expected = state_after(0, [build(fuse_on)], None, do)
    models = [build(fuse_on) for _ in range(RANKS)]  # not on threads, which share a generator
    for state in on_threads(RANKS, state_after, models, shard, do):
        assert_same(state, expected)
