"""The dtypes that sums over experts are taken in, whatever autocast computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in: float32, or float64 for float64 experts."""
    return torch.promote_types(dtype, torch.float32)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in on a device, or None where it is off."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which operations on a device compute in the dtypes that they are given."""
    if not torch.amp.is_autocast_available(device.type):  # such as "meta"
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
