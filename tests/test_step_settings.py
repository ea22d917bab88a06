"""Under `fuse_on="step"`: settings of optimizers, and custom optimizers."""

from typing import Any

import pytest
import torch

import exfusion_param as exf
from exfusion_testing.step_models import (
    EXACT,
    VARIANTS,
    Experts,
    assert_equals_oracle,
    assert_same,
    batch,
    dense_state,
    loss_of,
    train,
    wrapped,
)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("make", "setting", "value"),
    [(exf.ExpertAdamW, "amsgrad", True), (exf.ExpertSGD, "dampening", 0.5)],
)
def test_settings_that_experts_cannot_have_are_refused_in_groups(
    variant: str, make: Any, setting: str, value: Any
) -> None:
    model = wrapped(variant)
    with pytest.raises(ValueError, match=setting):
        make([{"params": list(model.parameters()), setting: value}], lr=0.02)


@pytest.mark.parametrize("variant", EXACT)
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.SGD, {"dampening": 0.5, "momentum": 0.9}),
        (torch.optim.Adam, {"weight_decay": 0.1}),
        (torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
        (torch.optim.AdamW, {"maximize": True}),
        (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
        (torch.optim.AdamW, {"lr": torch.tensor(0.02)}),
        (torch.optim.AdamW, {"differentiable": False, "capturable": False}),
    ],
)
def test_settings_of_torchs_optimizers_are_those_of_the_experts(
    variant: str, make: Any, settings: dict[str, Any]
) -> None:
    model = wrapped(variant)
    oracle = Experts(model)
    settings = {"lr": 0.02} | settings
    ours = make([{"params": list(model.parameters()), **settings}])
    theirs = make([{"params": oracle.parameters(), **settings}])
    for seed in range(5):
        for each, optimizer in ((model, ours), (oracle, theirs)):
            optimizer.zero_grad()
            loss_of(each, batch(seed)).backward()
            optimizer.step()
    assert_equals_oracle(model, oracle)


def test_decay_that_is_coupled_is_right_or_refused() -> None:
    model = wrapped("dw")
    oracle = Experts(model)
    ours = torch.optim.AdamW(model.parameters(), lr=0.02)
    theirs = torch.optim.AdamW(oracle.parameters(), lr=0.02)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0] |= {"decoupled_weight_decay": False, "weight_decay": 0.5}
    for seed in range(5):
        for each, optimizer in ((model, ours), (oracle, theirs)):
            optimizer.zero_grad()
            loss_of(each, batch(seed)).backward()
            optimizer.step()
    assert_equals_oracle(model, oracle)
    optimizer = exf.ExpertAdamW(model.parameters(), lr=0.02)
    optimizer.param_groups[0]["decoupled_weight_decay"] = False
    before = dense_state(model)
    with pytest.raises(ValueError, match="decoupled_weight_decay=False"):
        optimizer.step()
    assert_same(dense_state(model), before, 0)


class Calls(torch.optim.AdamW):
    """In the manner of public repositories: a subclass whose step calls its base's."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = 0.02
        return super().step(closure)


@pytest.mark.parametrize("variant", EXACT)
def test_a_subclass_whose_step_calls_its_bases_is_right(variant: str) -> None:
    model = wrapped(variant)
    oracle = Experts(model)
    theirs = torch.optim.AdamW(oracle.parameters(), lr=0.02)
    ours = Calls(model.parameters(), lr=0.5)
    for seed in range(5):
        for each, optimizer in ((model, ours), (oracle, theirs)):
            optimizer.zero_grad()
            loss_of(each, batch(seed)).backward()
            optimizer.step()
    assert_equals_oracle(model, oracle)


def test_a_subclass_whose_step_calls_its_bases_moves_a_bank_once() -> None:
    model, twin = wrapped("mb"), wrapped("mb")
    train(model, Calls(model.parameters(), lr=0.5))
    train(twin, torch.optim.AdamW(twin.parameters(), lr=0.02))
    assert_same(model.state_dict(), twin.state_dict(), 1e-12)
