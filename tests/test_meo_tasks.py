"""Merging Experts into One by task: one weight for all samples, which folds into a dense model."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import exfusion_param as exf
from exfusion_param import meo
from exfusion_testing.meo_models import wrapped
from exfusion_testing.models import FFNs, inputs


@pytest.mark.parametrize("task", [1, "embedding"])
@pytest.mark.parametrize("shared_gate", [False, True])
def test_a_task_folds_into_a_dense_model(task: Any, shared_gate: bool) -> None:
    model = wrapped(level="task", task_dim=3, shared_gate=shared_gate).eval()
    task = torch.tensor([0.3, -1.0, 2.0]) if task == "embedding" else task
    meo.set_task(model, task)
    x = inputs(4, 3, 9)
    before = model(x)
    dense = meo.fused_state_dict(model, task=task)
    torch.testing.assert_close(meo.fused_state_dict(model), dense, rtol=0, atol=0)
    other = meo.fused_state_dict(model, task=0)
    plain = FFNs(4, 6).double()
    plain.load_state_dict(dense, strict=True)
    torch.testing.assert_close(plain(x), before, rtol=0, atol=1e-12)
    assert not torch.equal(dense["blocks.0.fc1.weight"], other["blocks.0.fc1.weight"])
    fused = meo.fuse(copy.deepcopy(model).train(), task=task)
    assert type(fused.blocks[0].fc1) is nn.Linear
    assert list(fused.state_dict()) == list(FFNs(4, 6).state_dict())
    torch.testing.assert_close(fused(x), before, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_weight_and_bias_of_a_task_are_merged_under_one_draw() -> None:
    model = wrapped(level="task", task_dim=2, top_k=2).train()
    meo.set_task(model, 0)
    linear, x = model.blocks[0].fc1, inputs(4, 3, 9)
    stacks = linear.parametrizations
    y = linear(x)
    outputs = torch.einsum("bti,noi->btno", x, stacks.weight.original) + stacks.bias.original
    flat = outputs.movedim(2, -1).reshape(-1, 5)
    gates = torch.linalg.lstsq(flat, y.reshape(-1, 1)).solution.flatten()
    torch.testing.assert_close(flat @ gates, y.flatten(), rtol=0, atol=1e-9)
    assert (gates.abs() > 1e-9).sum() == 2
    assert gates.sum().item() == pytest.approx(1)


def test_a_task_that_was_not_named_or_does_not_fit_is_refused() -> None:
    model = wrapped(level="task", task_dim=3)
    with pytest.raises(RuntimeError, match="Call meo.set_task"):
        model(inputs())
    for task in (3, -1, True, torch.zeros(2), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match="task must"):
            meo.set_task(model, task)
    with pytest.raises(ValueError, match="task must"):
        meo.fuse(model, task=9)
    for fuse in (exf.fuse, meo.fuse, meo.fused_state_dict):
        with pytest.raises(ValueError, match="No task is set"):
            fuse(model)
    with pytest.raises(ValueError, match="has no tasks"):
        meo.set_task(wrapped(), 0)
    with pytest.raises(ValueError, match="has no gates. Wrap it with meo.wrap"):
        meo.set_task(FFNs(), 0)
