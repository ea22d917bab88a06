"""Refuses backwards that compute the gradients of inputs and of learned weights apart.

Zero-bubble schedules of `torch.distributed.pipelining` compute the gradients of inputs first, and
those of parameters later, from what the first left where their paths meet. A vector that several
linears share meets the inputs where their experts do, and torch differentiates some of that twice:
an error of autograd, and on one rank, for which the others wait. So the last linear of an FFN notes
the backwards that pass its output, and refuses one that begins behind it.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..tensors.readable import is_transformed
from .votes.custom_ops import current_backward


@dataclasses.dataclass
class _Pass:
    """One forward of a linear.

    Args:
        weights: the group's, `LearnedWeights`.
        backward: the last one that has passed the linear's output.
    """

    weights: Any
    backward: int | None = None


class _Running(threading.local):
    forward: _Pass | None = None


_running = _Running()


def run_noting_backwards(weights: Any, x: Tensor, run_dense: Callable[[], Any]) -> Any:
    """The output of the last linear of an FFN, with learned weights, for its input."""
    if torch.compiler.is_compiling() or not _can_be_split(x):
        return run_dense()
    _running.forward = running = _Pass(weights)
    try:
        y = run_dense()
    finally:
        _running.forward = None
    return _AtOutput.apply(y, running)


def noting_backwards(owner: Any, weights: Tensor) -> Tensor:
    """The vector, shape (N,), of `LearnedWeights`, for the linear whose forward runs."""
    if torch.compiler.is_compiling():
        return weights
    running = _running.forward
    if running is None or running.weights is not owner or not weights.requires_grad:
        return weights
    noting: Tensor = _AtWeights.apply(weights, running)
    return noting


def _can_be_split(x: Tensor) -> bool:
    # To note backwards costs tens of microseconds, so only where somebody has imported pipelines.
    if "torch.distributed.pipelining" not in sys.modules:
        return False
    return x.requires_grad and torch.is_grad_enabled() and not is_transformed(x)


class _AtOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, running: _Pass) -> Tensor:
        ctx.running = running
        return y.detach()  # not a view, which the next layer could not write to in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.running.backward = current_backward()
        return gradient, None


class _AtWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, running: _Pass) -> Tensor:
        ctx.running = running
        return weights.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if ctx.running.backward != current_backward():
            raise RuntimeError(
                f"The learned fusion weights of {ctx.running.weights.group!r} are shared by "
                "several linears, and their gradient cannot be computed apart from that of the "
                "inputs, as pipelines with a zero-bubble schedule do, under "
                'fuse_on="forward". Wrap with fuse_on="step", or take another schedule.'
            )
        return gradient, None
