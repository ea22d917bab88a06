"""A run that resumes with another number of experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import exfusion_param as exf
from exfusion_param.checkpoint import Checkpoints
from exfusion_param.checkpoint.run.resize_math import resize
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.runs import Run
from exfusion_testing.sharded import EXACT


@pytest.mark.parametrize("numbers", [(3, 5), (4, 2), (5, 3), (2, 9)])
@pytest.mark.parametrize(
    "config",
    [
        *({"variant": v, "fuse_on": m} for v in ("sw", "dw", "mb") for m in ("forward", "step")),
        {"fuse_on": "step", "optimizer": torch.optim.AdamW},
    ],
    ids=str,
)
def test_other_numbers_of_experts_fuse_to_the_same_weights(
    tmp_path: Path, config: dict[str, Any], numbers: tuple[int, int]
) -> None:
    run = Run(tmp_path, num_experts=numbers[0], **config).train(0, 3)
    run.checkpoints.save(3)
    other = Run(tmp_path, num_experts=numbers[1], **config)
    assert other.checkpoints.resume(resize_experts=True) == 3
    for name, tensor in exf.fused_state_dict(run.model).items():
        torch.testing.assert_close(
            exf.fused_state_dict(other.model)[name], tensor, rtol=0, atol=1e-12
        )
    other.train(3, 5)


@given(
    weights=st.lists(st.floats(0, 2), min_size=1, max_size=9),
    count=st.integers(1, 9),
)
def test_a_resize_keeps_every_weighted_sum(weights: list[float], count: int) -> None:
    before = torch.tensor(weights, dtype=torch.float64)
    if count == len(weights):
        return
    after = resize(before, count)
    assert after.experts.shape == after.shares.shape == (count, len(weights))
    torch.testing.assert_close(after.weights @ after.experts, before, **EXACT)
    torch.testing.assert_close(after.weights.sum(), before.sum(), **EXACT)
    ones = torch.ones(count, dtype=torch.float64)
    torch.testing.assert_close(after.experts.sum(dim=1), ones, **EXACT)
    torch.testing.assert_close(after.shares.sum(dim=1), ones, **EXACT)


@pytest.mark.parametrize(("weights", "count"), [([1.0, -1.0], 3), ([1.0, -1.0, 2.0, 1.0], 2)])
def test_weights_that_cancel_out_cannot_be_resized(weights: list[float], count: int) -> None:
    with pytest.raises(ValueError, match="sum to zero"):
        resize(torch.tensor(weights), count)


def leave_by_zero_grad(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()


def leave_by_overflow(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(float("inf"))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def leave_waiting(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """In the middle of an accumulation."""


@pytest.mark.parametrize("leave", [leave_by_zero_grad, leave_by_overflow, leave_waiting])
@pytest.mark.parametrize("fuse_on", ["forward", "step"])
@pytest.mark.parametrize("variant", ["dw", "mb"])
def test_what_waits_for_a_step_is_dropped_where_experts_change_in_number(
    tmp_path: Path, variant: Any, fuse_on: Any, leave: Any
) -> None:
    def run(count: int) -> tuple[Any, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = exf.wrap(
            FFNs().double(),
            variant=variant,
            num_experts=count,
            fuse_on=fuse_on,
            bank_init="uniform",
        )
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def step(model: Any, optimizer: Any) -> dict[str, Any]:
        loss_of(model, inputs(seed=2)).backward()
        optimizer.step()
        optimizer.zero_grad()
        return model.state_dict()

    model, optimizer = run(4)
    step(model, optimizer)
    Checkpoints(tmp_path / "clean", {"model": model, "optimizer": optimizer}).save(1)
    loss_of(model, inputs()).backward()
    leave(model, optimizer)
    Checkpoints(tmp_path / "left", {"model": model, "optimizer": optimizer}).save(1)
    after = []
    for folder in ("clean", "left"):
        model, optimizer = run(6)
        checkpoints = Checkpoints(tmp_path / folder, {"model": model, "optimizer": optimizer})
        if folder == "left" and leave is leave_waiting:
            with pytest.warns(UserWarning, match="dropped, as the model has another number"):
                checkpoints.resume(resize_experts=True)
        else:
            checkpoints.resume(resize_experts=True)
        after.append(step(model, optimizer))
    assert all(torch.equal(value, after[1][name]) for name, value in after[0].items())
