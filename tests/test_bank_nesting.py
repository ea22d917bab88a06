"""Banks where a backward runs within another, and where gradients are differentiated again."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from exfusion_param.tensors import functional
from exfusion_testing.banks import MOMENTUM, X, assert_bank, bank_of, current, make, moved

MODES: list[Any] = ["forward", "step"]


class Reversible(torch.autograd.Function):
    """Runs a block without a graph, and again in the backward, as reversible networks do."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.block, ctx.parameters = block, parameters
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            inputs = (x, *ctx.parameters)
            gradients = torch.autograd.grad(ctx.block(x), inputs, gradient, allow_unused=True)
        return (None, *gradients)


class Adjoint(Reversible):
    """Three steps of an ordinary differential equation, solved backwards for the gradients."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
        for _ in range(3):
            x = x + 0.1 * Reversible.forward(ctx, block, x)
        ctx.parameters = parameters
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,), sums = ctx.saved_tensors, [torch.zeros_like(p) for p in ctx.parameters]
        for _ in range(3):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                y = ctx.block(x)
                back, *parts = torch.autograd.grad(
                    y, (x, *ctx.parameters), gradient, allow_unused=True
                )
            x, gradient = x - 0.1 * y, gradient + 0.1 * back
            sums = [a if b is None else a + 0.1 * b for a, b in zip(sums, parts, strict=True)]
        return (None, gradient, *sums)


def used(model: nn.Module, kind: Any, x: Tensor) -> Tensor:
    """The mean `w` of the uses of the block in the backward."""
    bank, routed = bank_of(model), []
    x = model.stem(x)
    with torch.no_grad():
        if kind is Reversible:
            return functional.route(x, bank.router)
        for _ in range(3):
            x = x + 0.1 * model.blocks[0](x)
        for _ in range(3):
            routed.append(functional.route(x, bank.router))
            x = x - 0.1 * model.blocks[0](x)
    return torch.stack(routed).mean(0)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", [Reversible, Adjoint])
@pytest.mark.parametrize("fuse_on", MODES)
def test_a_backward_counts_whose_gradients_an_outer_one_hands_on(
    fuse_on: Any, kind: Any, frozen: bool
) -> None:
    model = make(fuse_on=fuse_on)
    bank, block = bank_of(model), model.blocks[0]
    bank.router.requires_grad_(not frozen)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):
        means = torch.stack([used(model, kind, x) for x in X[:2]])
        expected = MOMENTUM * bank.bank + (1 - MOMENTUM) * means.mean(0)
        for x in X[:2]:
            inside = [p for p in block.parameters() if p.requires_grad]
            kind.apply(block, model.stem(x), *inside).square().mean().backward()
        optimizer.step()
        assert_bank(model, expected)
        optimizer.zero_grad()


@pytest.mark.parametrize("fuse_on", MODES)
def test_a_backward_within_one_that_is_thrown_away_does_not_count(fuse_on: Any) -> None:
    model = make(fuse_on=fuse_on)
    block = model.blocks[0]
    parameters = list(block.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        expected = moved(model, X[0])
        y = Reversible.apply(block, model.stem(X[1]), *parameters)
        torch.autograd.grad(y.square().mean(), model.stem.weight)
        model(X[0]).square().mean().backward()
        optimizer.step()
        assert_bank(model, expected)
        optimizer.zero_grad()


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("fuse_on", MODES)
def test_maml_counts_each_forward_once_that_the_gradient_goes_through(
    fuse_on: Any, first_order: bool
) -> None:
    model = make(fuse_on=fuse_on)
    bank = bank_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        before = dict(model.named_parameters())
        inner = functional_call(model, before, (X[0],)).square().mean()
        gradients = torch.autograd.grad(inner, list(before.values()), create_graph=not first_order)
        names = zip(before.items(), gradients, strict=True)
        fast = {name: p - 0.1 * gradient for (name, p), gradient in names}
        with torch.no_grad():
            name = next(name for name, p in before.items() if p is bank.router)
            stem = functional_call(model.stem, _within(fast, "stem."), (X[1],))
            outer = functional.route(stem, fast[name])
        w = outer if first_order else (current(model, X[0]) + outer) / 2
        expected = MOMENTUM * bank.bank + (1 - MOMENTUM) * w
        functional_call(model, fast, (X[1],)).square().mean().backward()
        optimizer.step()
        assert_bank(model, expected)


def _within(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
