"""The states of AdamW and SGD on experts: loaded from torch's, cast, copied, rounded."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import exfusion_param as exf
from exfusion_testing.expert_optimizers import ADAMW, Make, assert_same, step, train, wrapped
from exfusion_testing.models import FFNs, inputs, loss_of


@pytest.mark.parametrize("fuse_on", ["forward", "step"])
def test_either_goes_on_with_the_others_states(fuse_on: Any) -> None:
    makes: list[Make] = [
        lambda params: torch.optim.AdamW(params, **ADAMW),
        lambda params: exf.ExpertAdamW(params, **ADAMW),
    ]
    expected = wrapped()
    train(expected, makes[0](expected.parameters()), range(4))
    for first, second in (makes, makes[::-1]):
        model = wrapped()
        before = first(model.parameters())
        train(model, before, range(2))
        after = second(model.parameters())
        after.load_state_dict(before.state_dict())
        train(model, after, range(2, 4))
        assert_same(model, expected)


def test_states_from_before_a_cast_of_the_model_are_cast_with_it() -> None:
    model = wrapped().float()
    before = exf.ExpertAdamW(model.parameters())
    step(model, before, inputs(5).float())
    model.bfloat16()
    for state_dtype in (None, torch.float32):
        optimizer = exf.ExpertAdamW(model.parameters(), state_dtype=state_dtype)
        optimizer.load_state_dict(before.state_dict())
        step(model, optimizer, inputs(5).bfloat16())
        state = optimizer.state[model.blocks[0].fc1.weight]
        assert state["experts.exp_avg"].dtype == (state_dtype or torch.bfloat16)
        assert optimizer.state[model.stem.weight]["exp_avg"].dtype == torch.bfloat16


def test_a_copied_optimizer_goes_on() -> None:
    model = wrapped()
    optimizer = exf.ExpertAdamW(model.parameters(), state_dtype=torch.bfloat16)
    train(model, optimizer)
    model, optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer)
    state = optimizer.state[model.blocks[0].fc1.weight]
    assert state["experts.exp_avg"].dtype == torch.bfloat16
    assert state["step"] == 6


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32])
def test_replicas_round_alike_and_resume(state_dtype: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = exf.wrap(FFNs(16, 32), seed=1, fuse_on="step", bank_init="uniform").bfloat16()
    models = []
    for seed in (1, 2):  # of torch's global generator, which ranks seed differently
        model = copy.deepcopy(start)
        optimizer = exf.ExpertAdamW(model.parameters(), lr=1e-3, state_dtype=state_dtype)
        torch.manual_seed(seed)
        for step_seed in range(6):
            if seed == 2 and step_seed == 3:  # a new process
                torch.save(optimizer.state_dict(), tmp_path / "state.pt")
                optimizer = exf.ExpertAdamW(model.parameters(), state_dtype=state_dtype)
                optimizer.load_state_dict(torch.load(tmp_path / "state.pt"))
            step(model, optimizer, inputs(16, seed=step_seed).bfloat16())
        models.append(model)
    assert_same(*models, rtol=0, atol=0)


def test_a_grad_scaler_works_with_states_of_an_optimizer_that_is_not_fused() -> None:
    model = wrapped().float()
    theirs = torch.optim.AdamW(model.parameters())
    step(model, theirs, inputs(5).float())
    optimizer = exf.ExpertAdamW(model.parameters())
    optimizer.load_state_dict(theirs.state_dict())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, inputs(5).float())).backward()
    scaler.step(optimizer)
    assert optimizer.param_groups[0]["fused"]
