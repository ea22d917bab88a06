"""Training a wrapped model is training the paper's, step by step, in every loop."""

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_param import ExFusionConfig
from exfusion_testing.models import Checkpointing, FFNs, inputs, loss_of
from exfusion_testing.reference import ReferenceFFN, reference_of
from exfusion_testing.strategies import configs, hidden_sizes, sizes

STEPS = 4


def wrapped_ffns(config: ExFusionConfig, **kwargs: Any) -> FFNs:
    return exf.wrap(FFNs(**kwargs).double(), config)


def train(
    model: nn.Module,
    steps: Iterable[list[Tensor]],
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
) -> list[dict[str, Tensor]]:
    """The state after each step; an element of `steps` is the list of its micro-batches."""
    stepper = optimizer(model.parameters(), lr=0.01)
    states = []
    for micro_batches in steps:
        stepper.zero_grad()
        for x in micro_batches:
            (loss_of(model, x) / len(micro_batches)).backward()
        stepper.step()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states


def assert_same(
    ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]], tolerance: float = 1e-10
) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(
                a[name], b[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


def batches(dim: int = 4, count: int = STEPS) -> list[Tensor]:
    return [inputs(dim, seed=seed) for seed in range(count)]


@given(config=configs(), dim=sizes, hidden=hidden_sizes, bias=st.booleans())
def test_training_equals_the_papers_loop_over_experts(
    config: ExFusionConfig, dim: int, hidden: int, bias: bool
) -> None:
    model = wrapped_ffns(config, dim=dim, hidden=hidden, bias=bias)
    reference = reference_of(model, config)
    ours = torch.optim.AdamW(model.parameters(), lr=0.01)
    theirs = torch.optim.AdamW(reference.parameters(), lr=0.01)
    for x in batches(dim):
        losses = loss_of(model, x), loss_of(reference, x)
        torch.testing.assert_close(*losses, rtol=0, atol=1e-10)
        for loss, optimizer in zip(losses, (ours, theirs), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for block in reference.blocks:
            assert isinstance(block, ReferenceFFN)
            block.step()
    model.eval()
    reference.eval()
    torch.testing.assert_close(model(x), reference(x), rtol=0, atol=1e-10)


@given(config=configs())
def test_fuse_leaves_the_trained_function_unchanged(config: ExFusionConfig) -> None:
    model = wrapped_ffns(config)
    train(model, [[x] for x in batches()])
    model.eval()
    before = model(inputs(seed=9))
    state = exf.fused_state_dict(model)
    exf.fuse(model)
    assert torch.equal(model(inputs(seed=9)), before)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("variant", ["sw", "dw"])
def test_four_micro_batches_are_one_batch(variant: str) -> None:
    model = wrapped_ffns(ExFusionConfig(variant=variant))  # type: ignore[arg-type]
    whole = copy.deepcopy(model)
    states = train(model, [list(x.chunk(4)) for x in batches()])
    assert_same(states, train(whole, [[x] for x in batches()]))


@given(config=configs(variant="mb"), count=st.integers(2, 4))
def test_equal_micro_batches_are_one_batch_for_the_memory_bank(
    config: ExFusionConfig, count: int
) -> None:
    model = wrapped_ffns(config)
    whole = copy.deepcopy(model)
    states = train(model, [[x] * count for x in batches()])
    assert_same(states, train(whole, [[x] for x in batches()]))


@pytest.mark.parametrize("variant", ["sw", "dw", "mb"])
@pytest.mark.parametrize("shared_router", [True, False])
@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_activation_checkpointing_changes_nothing(
    variant: str, shared_router: bool, checkpointing: Checkpointing, micro_batches: int
) -> None:
    config = ExFusionConfig(variant=variant, shared_router=shared_router)  # type: ignore[arg-type]
    model = wrapped_ffns(config)
    checkpointed = copy.deepcopy(model)
    checkpointed.checkpointing = checkpointing
    steps = [list(x.chunk(micro_batches)) for x in batches()]
    assert_same(train(checkpointed, steps), train(model, steps))
