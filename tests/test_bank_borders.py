"""The memory bank at its borders: unusual loops count right, and what cannot is said."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from exfusion_param.tensors import functional
from exfusion_testing.banks import MOMENTUM, X, assert_bank, backward, bank_of, make, moved

MODES: list[Any] = ["forward", "step"]


def of_both(fuse_on: Any) -> tuple[nn.Module, Any]:
    """A model and its memory bank's module."""
    model = make(fuse_on=fuse_on)
    return model, bank_of(model)


@pytest.mark.parametrize("checkpointed", [0, 1, 2])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("fuse_on", MODES)
def test_every_use_of_an_ffn_counts_where_one_runs_in_a_backward_within_the_backward(
    fuse_on: Any, frozen: bool, checkpointed: int
) -> None:
    model, bank = of_both(fuse_on)
    bank.router.requires_grad_(not frozen)
    block = model.blocks[0]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        x, routed = model.stem(X[0]), []
        for use in range(3):
            with torch.no_grad():
                routed.append(functional.route(x, bank.router))
            x = x + (checkpoint(block, x, use_reentrant=True) if use == checkpointed else block(x))
        expected = MOMENTUM * bank.bank + (1 - MOMENTUM) * torch.stack(routed).mean(0)
        x.square().mean().backward()
        optimizer.step()
        assert_bank(model, expected)
        optimizer.zero_grad()


@pytest.mark.parametrize("is_dropped", [False, True])
@pytest.mark.parametrize("thaws", [True, False])
def test_votes_stay_when_the_router_thaws_or_freezes_in_mid_accumulation(
    thaws: bool, is_dropped: bool
) -> None:
    model = make()
    router = bank_of(model).router
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        router.requires_grad_(not thaws)
        expected = moved(model, *X[int(is_dropped) :])
        backward(model, X[0])
        if is_dropped:
            optimizer.zero_grad()
        router.requires_grad_(thaws)
        backward(model, *X[1:])
        optimizer.step()
        assert_bank(model, expected)
        optimizer.zero_grad()
