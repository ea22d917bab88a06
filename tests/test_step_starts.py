"""The start of experts under `fuse_on="step"`, and warnings if it may not be intended."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import exfusion_param as exf
from exfusion_param.fusion_weights.base import FusionWeights
from exfusion_testing.experts import expert_stacks
from exfusion_testing.models import FFNs, inputs, loss_of

VARIANTS = ["sw", "dw", "mb"]


def wrapped(variant: str = "mb", **fields: Any) -> Any:
    torch.manual_seed(0)
    fields = {"bank_init": "uniform", "seed": 1} | fields
    return exf.wrap(FFNs().double(), variant=variant, fuse_on="step", **fields)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss_of(model, inputs()).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("variant", VARIANTS)
def test_experts_are_the_draws_of_the_forward_mode(variant: str) -> None:
    model = wrapped(variant)
    torch.manual_seed(0)
    forward = exf.wrap(FFNs().double(), variant=variant, bank_init="uniform", seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step(model, optimizer)
    torch.testing.assert_close(
        expert_stacks(model, optimizer), expert_stacks(forward, optimizer), rtol=0, atol=0
    )


@pytest.mark.parametrize("variant", ["sw", "dw"])  # no bank moves the weights
def test_a_model_loaded_without_its_optimizer_goes_on_and_says_so(variant: str) -> None:
    model = wrapped(variant)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    other = wrapped(variant, seed=2)
    other.load_state_dict(model.state_dict())
    before = other.blocks[0].fc1.weight.detach().clone()
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-30)
    with pytest.warns(UserWarning, match="2 FFN groups .'blocks.0' first. were loaded without"):
        step(other, optimizer)
    torch.testing.assert_close(other.blocks[0].fc1.weight.detach(), before, rtol=0, atol=1e-12)
    step(other, optimizer)  # says it once


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_next_optimizer_goes_on_with_the_experts(variant: str) -> None:
    model = wrapped(variant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    before = {name: stack.clone() for name, stack in expert_stacks(model, optimizer).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # and the first one is gone
    step(model, optimizer)
    torch.testing.assert_close(expert_stacks(model, optimizer), before, rtol=0, atol=1e-12)
    optimizer.state.clear()  # as to restart its running means
    step(model, optimizer)
    torch.testing.assert_close(expert_stacks(model, optimizer), before, rtol=0, atol=1e-12)


def test_training_goes_on_after_fuse_with_the_same_optimizer() -> None:
    model = wrapped()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step(model, optimizer)
    exf.fuse(model)
    assert all("experts" not in state for state in optimizer.state.values())
    step(model, optimizer)


def test_dense_weights_that_are_loaded_on_purpose_are_no_surprise() -> None:
    model = wrapped()
    exf.load_dense_state_dict(model, FFNs().double().state_dict())
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_weights_that_an_empty_bank_scales_down_are_announced() -> None:
    model = wrapped(bank_init="zeros")
    for block in model.blocks:
        block.fc1.reset_parameters()
    with pytest.warns(UserWarning, match="is zero, and their weights were written after wrap"):
        step(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loop_without_an_optimizer_is_noticed_when_the_model_is_fused(variant: str) -> None:
    model = wrapped(variant)
    for _ in range(3):
        loss_of(model, inputs()).backward()
        for parameter in model.parameters():
            parameter.data.add_(parameter.grad, alpha=-0.1)
    shipped = copy.deepcopy(model.blocks[0].fc1.weight)
    with pytest.warns(UserWarning, match="without a step of a torch.optim.Optimizer on them"):
        exf.fuse(model)
    assert torch.equal(model.blocks[0].fc1.weight, shipped)


def by_hand(model: nn.Module, steps: int, *, by_data: bool = False) -> None:
    for _ in range(steps):
        loss_of(model, inputs()).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                written = parameter.data if by_data else parameter
                written.sub_(parameter.grad, alpha=0.01)
        model.zero_grad()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("by_data", [False, True])
def test_a_loop_without_an_optimizer_is_noticed_within_twelve_steps(
    variant: str, by_data: bool
) -> None:
    model = wrapped(variant)
    by_hand(model, 11, by_data=by_data)
    with pytest.warns(UserWarning, match="'blocks.*' have changed over 12 backwards") as caught:
        by_hand(model, 30, by_data=by_data)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="2 FFN groups .* changed since wrap"):
        exf.fuse(model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loops_with_an_optimizer_are_not_warned_of(variant: str) -> None:
    model, teacher = wrapped(variant), wrapped(variant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(40):  # micro-batches before the first step
        loss_of(model, inputs()).backward()
    optimizer.step()
    by_hand(model, 20)  # between two steps of an optimizer
    for _ in range(20):
        x = inputs().requires_grad_()
        with torch.no_grad():
            for average, parameter in zip(teacher.parameters(), model.parameters(), strict=True):
                average.lerp_(parameter, 0.1)
        with torch.no_grad():
            teacher(x)
        step(model, optimizer)


def test_frozen_weights_that_are_written_are_not_warned_of() -> None:
    model = wrapped("sw").requires_grad_(False)
    for _ in range(20):
        model(inputs().requires_grad_()).sum().backward()
        for parameter in model.parameters():
            parameter.mul_(0.99)


def test_sam_before_its_first_step_is_not_warned_of() -> None:
    model = wrapped("sw")
    for _ in range(2):
        for _ in range(6):
            loss_of(model, inputs()).backward()
        for parameter in model.parameters():
            parameter.data.mul_(1.01)


def test_a_checkpoint_that_is_only_shipped_warns_of_nothing() -> None:
    model, other = wrapped(), wrapped(seed=2)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    other.load_state_dict(model.state_dict())
    assert torch.equal(exf.fuse(other)(inputs()), exf.fuse(model)(inputs()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("expert_init", ["independent", "upcycle", "drop_upcycle"])
def test_a_model_from_the_meta_device_starts_around_its_own_initialisation(
    variant: str, expert_init: Any
) -> None:
    config = exf.ExFusionConfig(
        variant=variant,  # type: ignore[arg-type]
        fuse_on="step",
        seed=1,
        bank_init="uniform",
        expert_init=expert_init,
    )
    with torch.device("meta"):
        model: Any = exf.wrap(FFNs().double(), config)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters") and not isinstance(module, FusionWeights):
            module.reset_parameters()
    weight = model.blocks[0].fc1.weight
    start = weight.detach().clone()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    step(model, torch.optim.SGD(model.parameters(), lr=0.0))
    atol = 1e-12 if variant != "mb" else 0.1  # the bank has moved
    torch.testing.assert_close(weight.detach(), start, rtol=0, atol=atol)


def test_weights_that_are_tied_after_wrapping_are_refused() -> None:
    model = wrapped("sw")
    model.blocks[1].fc1.weight = model.blocks[0].fc1.weight
    with pytest.raises(RuntimeError, match="'blocks.0.fc1.weight' and 'blocks.1.fc1.weight' were"):
        step(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_experts_of_another_number_are_refused() -> None:
    model, other = wrapped("sw"), wrapped("sw", num_experts=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    again = torch.optim.SGD(other.parameters(), lr=0.1)
    again.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="has 4 experts of 'blocks.0.fc1.weight', and the model"):
        step(other, again)


def refuses_until_it_is_loaded(
    model: Any, optimizer: torch.optim.Optimizer, saved: list[Any]
) -> None:
    message = f"A step of {type(optimizer).__name__} failed when some experts had moved"
    for refused in (
        optimizer.step,
        lambda: exf.fuse(model),
        lambda: exf.fused_state_dict(model),
    ):
        with pytest.raises(RuntimeError, match=message):
            refused()
    with pytest.warns(UserWarning, match=message):
        optimizer.state_dict()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    exf.fused_state_dict(model)
    step(model, optimizer)
    optimizer.state_dict()
    exf.fuse(model)


def fails(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("no memory left")


@pytest.mark.parametrize("make", [torch.optim.SGD, exf.ExpertSGD])
def test_a_step_that_failed_between_two_experts_cannot_go_on(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped("sw")
    optimizer = make(model.parameters(), lr=0.1)
    step(model, optimizer)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    with monkeypatch.context() as patch:
        patch.setattr("exfusion_param.step.torch_optimizers._store", fails)
        patch.setattr("exfusion_param.step.stack_step.torch.addmv", fails)
        with pytest.raises(torch.OutOfMemoryError):
            step(model, optimizer)
    refuses_until_it_is_loaded(model, optimizer, saved)


class FailsAtTheTenth(torch.optim.Optimizer):
    """SGD that fails among the experts."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.fails = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        every = [p for group in self.param_groups for p in group["params"]]
        for index, parameter in enumerate(every):
            if self.fails and index == 10:
                fails()
            parameter.sub_(parameter.grad, alpha=0.1)


def test_an_optimizer_that_failed_between_two_experts_cannot_go_on() -> None:
    model = wrapped("sw")
    optimizer = FailsAtTheTenth(model.parameters())
    step(model, optimizer)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    optimizer.fails = True
    with pytest.raises(torch.OutOfMemoryError):
        step(model, optimizer)
    optimizer.fails = False
    refuses_until_it_is_loaded(model, optimizer, saved)
