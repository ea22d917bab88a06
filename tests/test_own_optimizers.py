"""Under `fuse_on="step"`: what optimizers of one's own do with parameters, beside torch's SGD."""

from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import SGD, Optimizer

from exfusion_testing.step_models import VARIANTS, assert_same, train, wrapped

LR = 0.1


class Plain(Optimizer):
    """Gradient descent, in place."""

    def __init__(self, params: Any, inner: Any = None) -> None:
        super().__init__(params, {"lr": LR})
        self.inner = inner

    def held(self) -> list[Optimizer]:
        """The optimizers within this one."""
        every = self.inner if isinstance(self.inner, list) else [self.inner]
        return [optimizer for optimizer in every if optimizer is not None]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for optimizer in self.held():
            optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            names = group.get("param_names", [""] * len(group["params"]))
            for name, parameter in zip(names, group["params"], strict=True):
                if parameter.grad is not None:
                    self.update(name, parameter, group["lr"])
        for optimizer in self.held():
            optimizer.step()

    def update(self, name: str, parameter: nn.Parameter, lr: float) -> None:
        parameter -= lr * parameter.grad


class Rebinding(Plain):
    """Puts a new tensor in the place of each parameter's data."""

    def update(self, name: str, parameter: nn.Parameter, lr: float) -> None:
        parameter.data = parameter.data - lr * parameter.grad


class ByAttribute(Plain):
    """Has a factor of the rate from the parameter itself."""

    def update(self, name: str, parameter: nn.Parameter, lr: float) -> None:
        parameter -= lr * getattr(parameter, "lr_scale", 1.0) * parameter.grad


class ByName(Plain):
    """Leaves parameters of some names where they are."""

    def update(self, name: str, parameter: nn.Parameter, lr: float) -> None:
        parameter -= lr * (0.0 if "fc1" in name else 1.0) * parameter.grad


class ByDict(Plain):
    """Has its momentum in a dict of its own, filled at the start or as it steps."""

    def __init__(self, params: Any, key: Any, is_filled: bool) -> None:
        super().__init__(params)
        self.key = key
        self.momentum = {
            key(p): torch.zeros_like(p)
            for group in self.param_groups
            for p in group["params"]
            if is_filled
        }

    def update(self, name: str, parameter: nn.Parameter, lr: float) -> None:
        momentum = self.momentum.setdefault(self.key(parameter), torch.zeros_like(parameter))
        parameter -= lr * momentum.mul_(0.9).add_(parameter.grad)


class Combined(Plain):
    """Steps by the optimizers that it holds, on whose groups it was made."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        super().__init__([group for each in optimizers for group in each.param_groups], optimizers)

    def update(self, name: str, parameter: nn.Parameter, lr: float) -> None:
        pass


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices, and the rest."""
    parameters = list(model.parameters())
    return [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]


def assert_trains_as(variant: str, make: Any, rate_of: Any = lambda name: 1.0) -> None:
    """The same as SGD with these factors of its rate, by the parameter's name."""
    ours, theirs = wrapped(variant), wrapped(variant)
    train(ours, make(ours))
    named = theirs.named_parameters()
    train(theirs, SGD([{"params": [p], "lr": LR * rate_of(name)} for name, p in named], lr=LR))
    assert_same(ours.state_dict(), theirs.state_dict(), 1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_that_a_step_puts_elsewhere_are_followed(variant: str) -> None:
    assert_trains_as(variant, lambda model: Rebinding(model.parameters()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_attributes_of_parameters_are_those_of_their_experts(variant: str) -> None:
    def make(model: Any) -> Optimizer:
        model.blocks[0].fc1.weight.lr_scale = 0.5
        model.blocks[1].fc2.bias.lr_scale = 0.0
        return ByAttribute(model.parameters())

    rates = {"blocks.0.fc1.weight": 0.5, "blocks.1.fc2.bias": 0.0}
    assert_trains_as(variant, make, lambda name: rates.get(name, 1.0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_of_parameters_are_those_of_their_experts(variant: str) -> None:
    def make(model: Any) -> Optimizer:
        return ByName(model.named_parameters())

    assert_trains_as(variant, make, lambda name: 0.0 if "fc1" in name else 1.0)
    model = wrapped(variant)
    optimizer = train(model, make(model))
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_optimizer_that_has_another_one_for_the_rest_steps_on_its_own(variant: str) -> None:
    def make(model: Any) -> Optimizer:
        matrices, rest = split(model)
        return Plain(matrices, SGD(rest, lr=LR))

    assert_trains_as(variant, make)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_optimizer_that_steps_by_a_list_of_others_leaves_all_to_them(variant: str) -> None:
    def make(model: Any) -> Optimizer:
        return Combined([SGD(part, lr=LR) for part in split(model)])

    assert_trains_as(variant, make)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_in_the_groups_of_both_optimizers_are_refused(variant: str) -> None:
    model = wrapped(variant)

    matrices, rest = split(model)
    optimizer = Plain([*matrices, *rest], SGD(rest, lr=LR))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="its param_groups hold both. Have its"):
        train(model, optimizer)
    assert_same(model.state_dict(), before, 0)


@pytest.mark.parametrize("is_filled", [True, False])
@pytest.mark.parametrize("key", [lambda p: p, id], ids=["parameter", "id"])
def test_a_dict_by_parameter_is_refused_and_trains_under_forward(key: Any, is_filled: bool) -> None:
    model = wrapped("sw")
    with pytest.raises(RuntimeError, match=r"dict by parameter, 'momentum'. .* self.state\[param"):
        train(model, ByDict(model.parameters(), key, is_filled))
    train(wrapped("sw"), ByDict(wrapped("sw").head.parameters(), key, is_filled))
    ours, theirs = wrapped("sw", fuse_on="forward"), wrapped("sw", fuse_on="forward")
    train(ours, ByDict(ours.parameters(), key, is_filled))
    train(theirs, SGD(theirs.parameters(), lr=LR, momentum=0.9))
    assert_same(ours.state_dict(), theirs.state_dict(), 1e-14)


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
def test_a_dict_by_parameter_of_what_an_optimizer_makes_again_is_not_refused() -> None:
    model = wrapped("sw")
    train(model, create_optimizer_v2(model, "kron", lr=1e-3))
