"""Gives parameters zero gradients in the backward; their own come at the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..tensors.readable import is_transformed
from ..tensors.shards import plus

Note = Callable[[], None]


def with_zero_gradient(y: Tensor, parameter: Tensor | None, note: Note | None = None) -> Tensor:
    """`y`, the same numbers, whose backward gives a parameter a gradient of zeros.

    DistributedDataParallel and FSDP2 wait for the gradients of all parameters that they manage.

    Args:
        y: any tensor of the forward.
        parameter: gets the gradient; None, or a frozen one, gets none.
        note: called in a backward that computes the parameter's gradient.

    Returns:
        `y` itself where no backward of this forward ends in `.grad`: without a graph, within
        `torch.func` transforms and forward-mode differentiation, and in an exported program.
    """
    if not isinstance(y, Tensor) or not y.requires_grad or is_transformed(y):
        return y
    if parameter is None or not parameter.requires_grad:
        return y
    if torch.compiler.is_exporting():
        return y
    if torch.compiler.is_compiling() and note is None:
        return plus(y, 0 * parameter.flatten()[:1].to(y.dtype))
    return _ZeroGradient.apply(y, _Token.apply(parameter, note))


def refuse_torch_func(weights: Tensor, group: str) -> None:
    """Raise if `torch.func` or forward-mode AD differentiates a router's output, shape (N,)."""
    if not torch.compiler.is_compiling() and is_transformed(weights) and _has_derivative(weights):
        raise RuntimeError(
            f"torch.func or forward-mode differentiation reached the router of {group!r} in "
            "training, where it would miss the router's part. Call model.eval(), in which the "
            'memory bank is constant; use torch.autograd; or wrap with fuse_on="step".'
        )


def _has_derivative(y: Tensor) -> bool:
    while torch._C._functorch.is_functorch_wrapped_tensor(y):
        if torch._C._functorch.is_gradtrackingtensor(y):
            return True
        y = torch._C._functorch.get_unwrapped(y)
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(y).tangent is not None


class _Token(torch.autograd.Function):
    """A zero that leads to the parameter only, so that a backward for inputs leaves it out."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, note: Note | None) -> Tensor:
        ctx.parameter, ctx.note = parameter, note
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if ctx.note is not None:
            ctx.note()
        return torch.zeros_like(ctx.parameter), None


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, token: Tensor) -> Tensor:
        # Not a view, which the next layer could not write to in place, as nn.ReLU(inplace=True).
        return y.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, torch.zeros(())
