"""Writes to a fused weight under `fuse_on="forward"`: none is lost silently."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_testing.models import FFNs, inputs, loss_of

LOST = r"An in-place write to the (weight|bias) of shape \(6.*\) in 'blocks.0' is lost"


def wrapped(variant: str = "mb", bank_init: Any = "uniform") -> Any:
    torch.manual_seed(0)
    return exf.wrap(FFNs(), variant=variant, bank_init=bank_init, seed=0)


def x() -> Tensor:
    return inputs().float()


def step(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loss_of(model, x()).backward()
    optimizer.step()


def scale_by_itself(linear: Any) -> None:
    linear.weight.data.normal_(0, linear.weight.shape[1] ** -0.5)


def read_thrice(linear: Any) -> None:
    first, _, _ = linear.weight.view(-1), linear.weight, linear.weight
    with torch.no_grad():
        first.mul_(2)


def after_a_step(linear: Any) -> None:
    weight = linear.weight
    with torch.no_grad():
        linear.parametrizations.weight.original.mul_(2)  # as an optimizer does
    weight.data.clamp_(-0.01, 0.01)


def after_a_forward(linear: Any) -> None:
    weight = linear.weight.data
    linear(torch.ones(4))
    weight[0] = 0


WRITES: list[Callable[[Any], None]] = [
    scale_by_itself,
    read_thrice,
    after_a_step,
    after_a_forward,
]
CHECKS: list[Callable[[Any], Any]] = [
    lambda model: model.blocks[0].fc1.weight,
    lambda model: model.state_dict(),
    lambda model: copy.deepcopy(model),
    exf.fused_state_dict,
    step,
]


@pytest.mark.parametrize("check", range(len(CHECKS)))
@pytest.mark.parametrize("write", range(len(WRITES)))
@pytest.mark.parametrize("variant", ["sw", "dw", "mb"])
def test_every_tensor_that_was_handed_out_is_watched(variant: str, write: int, check: int) -> None:
    model = wrapped(variant)
    WRITES[write](model.blocks[0].fc1)
    with pytest.raises(RuntimeError, match=LOST):
        CHECKS[check](model)
    CHECKS[check](model)  # it is said once


INITS: list[Callable[[Any], Any]] = [
    lambda linear: nn.init.zeros_(linear.bias),
    lambda linear: nn.init.normal_(linear.weight),
    lambda linear: linear.bias.data.zero_(),
    lambda linear: linear.weight.data.fill_(0.0),
    lambda linear: linear.weight.data.copy_(torch.zeros(6, 4)),
    lambda linear: nn.init.constant_(linear.weight, 0.0),
]


@pytest.mark.parametrize("init", range(len(INITS)))
def test_initialization_with_zeros_under_an_empty_bank_is_no_less_lost(init: int) -> None:
    model = wrapped(bank_init="zeros")
    assert not model.blocks[0].fc1.weight.any()
    INITS[init](model.blocks[0].fc1)
    with pytest.raises(RuntimeError, match=LOST):
        step(model)


@pytest.mark.parametrize("bank_init", ["zeros", "uniform"])
def test_weights_that_are_held_and_only_read_raise_nothing(bank_init: Any) -> None:
    model = wrapped(bank_init=bank_init)
    held = []
    for _ in range(3):
        linear = model.blocks[0].fc1
        held += [linear.weight, linear.bias.detach(), linear.weight.data.view(-1)]
        norm = sum(weight.square().sum() for weight in held)
        assert norm.isfinite()
        step(model)
        copy.deepcopy(model).state_dict()
    before = [weight.clone() for weight in held]
    step(model)
    assert all(torch.equal(a, b) for a, b in zip(before, held, strict=True))


@pytest.mark.compiled
def test_clipping_between_the_steps_of_a_compiled_model_is_seen_at_the_next_step() -> None:
    model = wrapped()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(compiled, x()).backward()
    optimizer.step()
    for block in model.blocks:
        block.fc1.weight.data.clamp_(-0.01, 0.01)
    loss_of(compiled, x()).backward()
    with pytest.raises(RuntimeError, match=LOST):
        optimizer.step()


def copy_of_itself(linear: Any) -> None:
    with torch.no_grad():
        linear.weight.copy_(torch.ones_like(linear.weight))


def through_views(linear: Any) -> None:
    rows = linear.weight.detach()[:2]
    assert linear.weight.isfinite().all()
    rows.fill_(1)


@pytest.mark.parametrize("write", [copy_of_itself, through_views])
def test_a_write_to_what_was_read_before_raises_in_the_next_forward(write: Any) -> None:
    model = wrapped("sw").eval()
    write(model.blocks[0].fc1)
    with pytest.raises(RuntimeError, match=LOST), torch.no_grad():
        model(x())


def test_data_that_is_assigned_to_what_was_read_before_is_seen() -> None:
    """As peft merges DoRA: it reads the weight again before it assigns to `.data`."""
    model = wrapped()
    linear = model.blocks[0].fc1
    weight = linear.weight
    merged = 2 * linear.weight.detach()
    weight.data = merged
    del weight
    with pytest.raises(RuntimeError, match=LOST):
        exf.fuse(model)
