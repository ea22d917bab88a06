"""What can be wrong with a memory bank: errors of its forward, and warnings.

Warnings are of collapsed routers and dead experts, of experts that train without their router, and
of banks that are still zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .base import FusionWeights
from .zero_gradients import is_transformed

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
        f"A linear of {group!r} ran without the one whose input its shared router "
        "reads: before it, outside of its checkpoint, in two threads at once, or replaced "
        "after wrap(). Checkpoint the whole FFN, or give each linear its own router, "
        "wrap(model, shared_router=False); train in one thread; put the linear back."
    )


def shares_of(bank: Tensor) -> Tensor:
    """The bank scaled so that an equal share is 1, shape (N,); ones while it is empty."""
    mass = bank.sum()
    return torch.where(mass == 0, 1.0, bank * bank.shape[0] / mass)


def warn_of_problems(group: str, routed: Tensor, shares: Tensor, warned: set[str]) -> None:
    """Warn of the problems of one step, of each kind once.

    Args:
        group: name of the FFN group.
        routed: the router's mean output at the step, shape (N,).
        shares: of `shares_of`, shape (N,).
        warned: the kinds that the user knows of; new ones are added.
    """
    for kind, problem in _problems(group, routed, shares):
        if kind not in warned:
            warned.add(kind)
            warnings.warn(problem, stacklevel=3)


def _problems(group: str, routed: Tensor, shares: Tensor) -> Iterator[tuple[str, str]]:
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


def warn_of_bypass(group: str) -> None:
    """Warn of experts that train without their router."""
    warnings.warn(
        f"The experts of {group!r} have gradients, but its router has seen no input: the model "
        "reads their weights without calling the linears, and the memory bank stays as it is. Use "
        'variant="sw" or "dw".',
        stacklevel=2,
    )


class EmptyBankAlarm:
    """Warns, once for all banks of a model, of an eval forward that fuses with zeros."""

    def __init__(self) -> None:
        self.is_given = False

    def __getstate__(self) -> dict[str, Any]:  # for a copy, which is another model
        return {"is_given": False}

    def give(self, group: str) -> None:
        """Warn of the model's first bank that was found empty."""
        self.is_given = True
        warnings.warn(
            f"The memory bank of {group!r} is still zero, so its FFN's fused weights are zero in "
            "this eval forward. Banks move when an optimizer steps on the model, and are buffers: "
            "an average, a copy or a checkpoint of parameters() only leaves them out. Use "
            "exfusion_param.routing.average_banks(target, source) or a whole state_dict(), "
            'evaluate after the first step, or wrap with bank_init="uniform".',
            stacklevel=2,
        )


def can_be_read(bank: Tensor) -> bool:
    """Whether a bank's numbers can be looked at here without disturbing what runs."""
    if type(bank) is not Tensor or bank.is_meta or is_transformed(bank):
        return False
    is_capturing = bank.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (is_capturing or torch.jit.is_tracing())  # type: ignore[attr-defined]


def share_alarm(groups: Iterable[FusionWeights]) -> None:
    """Let all banks of one model warn of an eval forward with an empty bank only once."""
    alarm = EmptyBankAlarm()
    for bank in _banks(groups):
        bank.alarm = alarm


def warn_of_empty_banks(groups: Iterable[FusionWeights]) -> None:
    """Warn if what is about to be shipped or loaded is multiplied by zero."""
    banks = [bank for bank in _banks(groups) if bank.is_empty()]
    for bank in banks:
        bank.alarm.is_given = True
    if empty := sorted(bank.group for bank in banks):
        warnings.warn(
            f"The memory bank of {len(empty)} FFN groups ({empty[0]!r} first) is still zero, and "
            'so are their fused weights. Train first, or wrap with bank_init="uniform".',
            stacklevel=3,
        )


def warn_of_empty_bank_once(weights: FusionWeights) -> None:
    """Warn if a weight that was just assigned is multiplied by zero; once for a model."""
    if any(not bank.alarm.is_given for bank in _banks([weights])):
        warn_of_empty_banks([weights])


def _banks(groups: Iterable[FusionWeights]) -> list[Any]:
    """Those that are memory banks, whose module imports this one."""
    return [group for group in groups if hasattr(group, "bank")]
