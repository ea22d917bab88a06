"""What can be wrong with a memory bank that trains, and how its user hears of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .base import FusionWeights

COLLAPSED = 0.99
"""A router's weight from which on the other experts count for nothing."""

DEAD = 0.01
"""A fusion weight, times N, below which an expert counts for nothing."""


def shares_of(bank: Tensor) -> Tensor:
    """The bank scaled so that an equal share is 1, shape (N,); ones while it is empty."""
    mass = bank.sum()
    return torch.where(mass == 0, 1.0, bank * bank.shape[0] / mass)


def problems(group: str, routed: Tensor, shares: Tensor) -> Iterator[tuple[str, str]]:
    """The problems of one step, each with its text.

    Args:
        group: name of the FFN group.
        routed: the router's mean output at the step, shape (N,).
        shares: of `shares_of`, shape (N,).
    """
    if routed.max() > COLLAPSED:
        yield (
            "collapsed",
            f"The router of {group!r} has collapsed: expert {int(routed.argmax())} has a weight of "
            f"{routed.max():.3f}, and the others next to none. A lower learning rate for routers "
            "(param_groups(fusion_lr=...)) may help.",
        )
    if shares.min() < DEAD:
        yield (
            "dead",
            f"Expert {int(shares.argmin())} of {group!r} is dead: its fusion weight is less than "
            f"{DEAD} of an equal share.",
        )


def warn_of_empty_banks(groups: Iterable[FusionWeights]) -> None:
    """Warn if what is about to be shipped or loaded is multiplied by zero."""
    if empty := sorted(weights.group for weights in groups if weights.is_empty()):
        warnings.warn(
            f"The memory bank of {len(empty)} FFN groups ({empty[0]!r} first) is still zero, and "
            'so are their fused weights. Train first, or wrap with bank_init="uniform".',
            stacklevel=3,
        )
