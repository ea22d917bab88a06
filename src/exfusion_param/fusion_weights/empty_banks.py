"""Warns of memory banks that are still zero, and with them the weights that they fuse."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from .bank_health import EmptyBankAlarm
from .base import FusionWeights
from .memory_bank import MemoryBank


def share_alarm(groups: Iterable[FusionWeights]) -> None:
    """Let all banks of one model warn of an eval forward with an empty bank only once."""
    alarm = EmptyBankAlarm()
    for bank in groups:
        if isinstance(bank, MemoryBank):
            bank.alarm = alarm


def warn_of_empty_banks(groups: Iterable[FusionWeights]) -> None:
    """Warn if what is about to be shipped or loaded is multiplied by zero."""
    banks = [bank for bank in groups if isinstance(bank, MemoryBank) and bank.is_empty()]
    for bank in banks:
        bank.alarm.is_given = True
    if empty := sorted(bank.group for bank in banks):
        warnings.warn(
            f"The memory bank of {len(empty)} FFN groups ({empty[0]!r} first) is still zero, and "
            'so are their fused weights. Train first, or wrap with bank_init="uniform".',
            stacklevel=3,
        )
