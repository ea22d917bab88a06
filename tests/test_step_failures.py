"""Under `fuse_on="step"`: steps that fail or are cut short, settings, several optimizers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import exfusion_param as exf
from exfusion_testing.step_models import (
    EXACT,
    VARIANTS,
    Experts,
    Net,
    adamw,
    assert_equals_oracle,
    assert_same,
    batch,
    dense_state,
    loss_of,
    train,
    wrapped,
)

X = batch(9)
Make = Callable[[Any], torch.optim.Optimizer]
MAKES: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
    "expert adamw": lambda p: exf.ExpertAdamW(p, lr=0.02),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.02),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


class FailedError(Exception):
    pass


def failing(*_: Any) -> None:
    raise FailedError


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("is_global", [False, True])
def test_a_pre_hook_that_raises_leaves_all_as_before(
    variant: str, make: str, is_global: bool
) -> None:
    model, twin = wrapped(variant), wrapped(variant)
    optimizers = [MAKES[make](each.parameters()) for each in (model, twin)]
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        train(each, optimizer)
    loss_of(model, X).backward()
    before = copy.deepcopy(model.state_dict())
    if is_global:
        hook = register_optimizer_step_pre_hook(failing)
    else:
        hook = optimizers[0].register_step_pre_hook(failing)
    with pytest.raises(FailedError):
        optimizers[0].step()
    hook.remove()
    assert_same(model.state_dict(), before, 0)
    model.zero_grad()
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        loss = each.blocks[1](each.embed(X)).square().mean()  # one FFN without a gradient
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(model.state_dict(), twin.state_dict(), 0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("make", MAKES)
def test_an_optimizer_that_raises_in_its_step_can_step_again(
    variant: str, make: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, twin = wrapped(variant), wrapped(variant)
    optimizers = [MAKES[make](each.parameters()) for each in (model, twin)]
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        train(each, optimizer)
        loss_of(each, X).backward()
    before = copy.deepcopy(model.state_dict())
    kind = next(k for k in type(optimizers[0]).__mro__ if "_init_group" in vars(k))
    with monkeypatch.context() as patch:
        patch.setattr(kind, "_init_group", failing)
        with pytest.raises(FailedError):
            optimizers[0].step()
    assert_same(model.state_dict(), before, 0)
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        optimizer.step()
        optimizer.zero_grad()
        train(each, optimizer)
    assert_same(model.state_dict(), twin.state_dict(), 0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("make", MAKES)
def test_a_closure_that_raises_leaves_all_as_before(variant: str, make: str) -> None:
    model, twin = wrapped(variant), wrapped(variant)
    optimizers = [MAKES[make](each.parameters()) for each in (model, twin)]
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        train(each, optimizer)
    with pytest.raises(FailedError):
        optimizers[0].step(failing)
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        train(each, optimizer)
    assert_same(model.state_dict(), twin.state_dict(), 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fused_state_dict_stays_as_it_was(variant: str) -> None:
    model = wrapped(variant)
    optimizer = train(model)
    best = exf.fused_state_dict(model)
    copies = {
        name: value.clone() for name, value in best.items() if "fc" in name
    }  # what is not fused shares memory, as in `state_dict()`
    train(model, optimizer)
    assert all(torch.equal(best[name], value) for name, value in copies.items())


@pytest.mark.parametrize("variant", EXACT)  # a bank's votes are no part of a state dict
@pytest.mark.parametrize("make", MAKES)
def test_a_run_that_is_saved_between_backward_and_step_goes_on(variant: str, make: str) -> None:
    model = wrapped(variant)
    optimizer = MAKES[make](model.parameters())
    train(model, optimizer)
    loss_of(model, X).backward()
    state = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    resumed = wrapped(variant)
    again = MAKES[make](resumed.parameters())
    resumed.load_state_dict(state[0])
    again.load_state_dict(state[1])
    for name, gradient in gradients.items():
        resumed.get_parameter(name).grad = gradient
    for stepper in (optimizer, again):
        stepper.step()
        stepper.zero_grad()
    assert_same(resumed.state_dict(), model.state_dict(), 0)


@pytest.mark.parametrize("variant", EXACT)
def test_experts_that_are_thawed_train_at_once(variant: str) -> None:
    model = wrapped(variant)
    oracle = Experts(model)
    ours, theirs = adamw(model), torch.optim.AdamW(oracle.parameters(), lr=0.02)
    for seed in range(5):
        is_frozen = seed in (0, 2, 3)
        model.blocks[0].fc1.weight.requires_grad_(not is_frozen)
        for leaf in oracle.leaves["blocks.0.fc1.weight"]:
            leaf.requires_grad_(not is_frozen)
        for each in (model, oracle):
            each.zero_grad()
            loss_of(each, batch(seed)).backward()
        if variant == "dw" and is_frozen:
            # <E_i, G> of a frozen weight has no part in the learned weights' gradient.
            model.zero_grad()
            oracle.zero_grad()
            continue
        for optimizer in (ours, theirs):
            optimizer.step()
    assert_equals_oracle(model, oracle)


def step_in_backward(model: nn.Module) -> list[torch.optim.Optimizer]:
    """One AdamW for each parameter, which steps when its gradient is there."""
    ours = {p: torch.optim.AdamW([p], lr=0.02) for p in model.parameters()}

    def step(parameter: nn.Parameter) -> None:
        ours[parameter].step()
        ours[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    return list(ours.values())


def test_an_optimizer_in_backward_trains_static_weights_as_the_oracle() -> None:
    model = wrapped("sw")
    oracle = Experts(model)
    theirs = torch.optim.AdamW(oracle.parameters(), lr=0.02)
    optimizers = step_in_backward(model)
    for seed in range(5):
        loss_of(model, batch(seed)).backward()
        loss_of(oracle, batch(seed)).backward()
        theirs.step()
        theirs.zero_grad()
    assert optimizers
    assert_equals_oracle(model, oracle)


@pytest.mark.parametrize("variant", ["dw", "mb"])
def test_an_optimizer_in_backward_is_refused_where_fusion_weights_train(variant: str) -> None:
    model = wrapped(variant)
    before = dense_state(model)
    optimizers = step_in_backward(model)
    with pytest.raises(RuntimeError, match="steps within a backward.*forward"):
        loss_of(model, X).backward()
    assert optimizers
    now = dense_state(model)
    assert all(torch.equal(now[n], before[n]) for n in before if "fc" in n)


class OwnList(torch.optim.Optimizer):
    """SGD on a list that it makes at its start, as some copies of Muon do."""

    def __init__(self, params: Any, *, by_data: bool) -> None:
        super().__init__(params, {})
        self.own = [p for group in self.param_groups for p in group["params"]]
        self.by_data = by_data

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.own:
            if parameter.grad is not None:
                written = parameter.data if self.by_data else parameter
                written.sub_(parameter.grad, alpha=0.1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("by_data", [False, True])
def test_an_optimizer_with_a_list_of_its_own_is_refused(variant: str, by_data: bool) -> None:
    model = wrapped(variant)
    optimizer = OwnList(model.parameters(), by_data=by_data)
    with pytest.raises(RuntimeError, match="OwnList steps on its own list.*fuse_on=.forward"):
        train(model, optimizer)
    forward = exf.wrap(Net(), variant=variant, bank_init="uniform")
    before = copy.deepcopy(forward.state_dict())
    train(forward, OwnList(forward.parameters(), by_data=by_data))
    now = forward.state_dict()
    assert all(not torch.equal(now[n], before[n]) for n in before if n.endswith("original"))


def test_a_closure_may_write_to_weights() -> None:
    model, twin = wrapped("sw"), wrapped("sw")
    ours, theirs = adamw(model), adamw(twin)
    for seed in range(3):

        def evaluate(seed: int = seed) -> torch.Tensor:
            model.zero_grad()
            model.blocks[0].fc1.weight.data.mul_(0.9)
            loss = loss_of(model, batch(seed))
            loss.backward()
            return loss

        ours.step(evaluate)
        twin.blocks[0].fc1.weight.data.mul_(0.9)
        train(twin, theirs, [seed])
    assert_same(model.state_dict(), twin.state_dict(), 1e-14)
