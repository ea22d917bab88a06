"""Warns of memory banks that are still zero, or stay as they are while their experts change.

An optimizer's step moves a bank. The parameters of a target network, a teacher or a key encoder are
an average of another model's, so that no step comes, and their bank stays where it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..tensors.readable import can_be_read
from ..tensors.shards import sample
from .base import FusionWeights

PATIENCE = 10
"""Forwards without a gradient, and without a step, after which a bank ought to have moved."""
NEARLY_FULL = 0.9
"""A mass from which on fused weights are not too small, whatever the bank."""
SIZE = 64
"""Numbers in a sample of the experts, at least."""
WAYS_OUT = (
    "Banks move when an optimizer steps on the model, and are buffers: an average, a copy or a "
    "checkpoint of parameters() only leaves them out. Use "
    "exfusion_param.routing.average_banks(target, source) or a whole state_dict(), evaluate after "
    'the first step, or wrap with bank_init="uniform".'
)


class BankAlarm:
    """Warns, once for all banks of a model."""

    def __init__(self) -> None:
        self.is_given = False

    def __getstate__(self) -> dict[str, Any]:  # for a copy, which is another model
        return {"is_given": False}

    def give(self, problem: str) -> None:
        """Warn of the model's first bank that was found empty."""
        self.is_given = True
        warnings.warn(f"{problem} {WAYS_OUT}", stacklevel=2)


class StillBank:
    """The record of a bank that possibly no step ever moves."""

    def __init__(self) -> None:
        self.alarm = BankAlarm()
        self.is_filled = False  # as far as is known without reading the bank again
        self._forwards = 0
        self._looks_at = 1  # the first forward, the 10th, the 100th, ...
        self._before: tuple[Tensor, Tensor] | None = None  # the bank, and some of its experts

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"is_filled": False, "_forwards": 0, "_looks_at": 1, "_before": None}

    def warn_if_zero(self, bank: Any) -> None:
        """Warn of an eval forward that fuses with zeros, unless it is compiled.

        Reads the bank, which synchronizes a GPU, until it is filled or the warning given.
        """
        if torch.compiler.is_compiling() or self.is_filled or self.alarm.is_given:
            return
        if not can_be_read(bank.numbers):
            return
        self.is_filled = not bank.fuses_zeros()
        if not self.is_filled:
            self.alarm.give(
                f"The memory bank of {bank.group!r} is still zero, so its FFN's fused weights are "
                "zero in this eval forward."
            )

    def watch(self, bank: Any) -> None:
        """A forward begins that moves no bank; warn if none has in so many while experts changed.

        Args:
            bank: the MemoryBank, under `fuse_on="forward"`.
        """
        if torch.compiler.is_compiling() or self.alarm.is_given:
            return
        stacks = bank.expert_stacks()
        if not (stacks and can_be_read(bank.numbers) and can_be_read(stacks[0])):
            return
        self._forwards += 1
        if self._forwards < self._looks_at:
            return
        self._looks_at *= PATIENCE
        now = bank.numbers.clone(), sample(stacks[0], SIZE)
        before = self._before = self._before or now
        if before is now or bank.votes.has_counted or bank.is_bypassed:
            return
        mass = float(now[0].sum())
        bank_stays, experts_stay = (_is_equal(*pair) for pair in zip(before, now, strict=True))
        if bank_stays and not (experts_stay and mass):
            while_what = "" if experts_stay else ", while its experts changed"
            but = "stay too small" if mass < NEARLY_FULL else "are not those it averages"
            self.alarm.give(
                f"The memory bank of {bank.group!r} sums to {mass:.2f} and has not moved in "
                f"{self._forwards} forwards without gradients{while_what}, so that its FFN's fused "
                f"weights {but}."
            )


def share_alarm(groups: Iterable[FusionWeights]) -> None:
    """Let all banks of one model warn only once."""
    alarm = BankAlarm()
    for bank in _banks(groups):
        bank.still.alarm = alarm


def warn_of_empty_banks(groups: Iterable[FusionWeights]) -> None:
    """Warn if what is about to be shipped or loaded is multiplied by zero."""
    banks = [bank for bank in _banks(groups) if bank.fuses_zeros()]
    for bank in banks:
        bank.still.alarm.is_given = True
    if empty := sorted(bank.group for bank in banks):
        warnings.warn(
            f"The memory bank of {len(empty)} FFN groups ({empty[0]!r} first) is still zero, and "
            'so are their fused weights. Train first, or wrap with bank_init="uniform".',
            stacklevel=3,
        )


def warn_of_empty_bank_once(weights: FusionWeights) -> None:
    """Warn if a weight that was just assigned is multiplied by zero; once for a model."""
    if any(not bank.still.alarm.is_given for bank in _banks([weights])):
        warn_of_empty_banks([weights])


def _banks(groups: Iterable[FusionWeights]) -> list[Any]:
    """Those that are memory banks, whose module imports this one."""
    return [group for group in groups if hasattr(group, "bank")]


def _is_equal(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and torch.equal(one, other)
