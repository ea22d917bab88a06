"""What can be wrong with a memory bank: errors of its forward, and warnings.

Warnings are of collapsed routers and dead experts, and of experts that train without their router.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

COLLAPSED = 0.99
"""A router's weight from which on the other experts count for nothing."""

DEAD = 0.01
"""A fusion weight, times N, below which an expert counts for nothing."""


def two_threads(group: str, what: str = "its memory bank") -> RuntimeError:
    """Two threads train one model."""
    return RuntimeError(
        f"{group!r} is trained by two threads at the same time, and {what} can "
        "follow only one input. Train in one thread, or in processes with "
        "DistributedDataParallel. In eval mode threads can share a model."
    )


def offloaded_in_training(group: str) -> RuntimeError:
    """The router is on the meta device."""
    return RuntimeError(
        f"The router of {group!r} is on the meta device in a training forward. "
        "accelerate's offloading is for inference: call model.eval()."
    )


def unobserved(group: str) -> RuntimeError:
    """A linear runs without the one whose input is routed."""
    return RuntimeError(
        f"A linear of {group!r} ran without the linear whose input its shared router "
        "reads: before it, outside of its checkpoint, in two threads at once, or replaced "
        "after wrap(). Checkpoint the whole FFN, or give each linear its own router, "
        "wrap(model, shared_router=False); train in one thread; put the linear back."
    )


def shares_of(bank: Tensor) -> Tensor:
    """The bank scaled so that an equal share is 1, shape (N,); ones while it is empty."""
    mass = bank.sum()
    return torch.where(mass == 0, 1.0, bank * bank.shape[0] / mass)


def warn_of_problems(group: str, routed: Tensor, shares: Tensor, warned: set[str]) -> None:
    """Warn of the problems of one step, each kind once; both tensors have shape (N,)."""
    problems: dict[str, str] = {}
    if routed.max() > COLLAPSED:
        problems["collapsed"] = (
            f"The router of {group!r} has collapsed: expert {int(routed.argmax())} has a weight of "
            f"{routed.max():.3f}, and the others next to none. A lower learning rate for routers "
            "(param_groups(fusion_lr=...)) may help."
        )
    if shares.min() < DEAD:
        problems["dead"] = (
            f"Expert {int(shares.argmin())} of {group!r} is dead: its fusion weight is less than "
            f"{DEAD} of an equal share."
        )
    for kind in [kind for kind in problems if kind not in warned]:
        warned.add(kind)
        warnings.warn(problems[kind], stacklevel=3)


def warn_of_bypass(group: str) -> None:
    """Warn of experts that train without their router."""
    warnings.warn(
        f"The experts of {group!r} have gradients, but its router has seen no input: the model "
        "reads their weights without calling the linears, trains in eval mode, or has gradients "
        "from torch.func or from another copy of it. The memory bank stays as it is. Use "
        'variant="sw" or "dw".',
        stacklevel=2,
    )
