"""The dtypes that sums over experts are taken in, and what moving or casting a module leaves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in: float32, or float64 for float64 experts."""
    return torch.promote_types(dtype, torch.float32)


def raise_precision(module: nn.Module) -> None:
    """Cast a module's own tensors to float32 where they are in less."""
    both: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for tensors in both:
        for name, tensor in tensors.items():
            if tensor is not None and tensor.is_floating_point() and tensor.dtype.itemsize < 4:
                raised = tensor.detach().float()
                is_parameter = isinstance(tensor, nn.Parameter)
                tensors[name] = (
                    nn.Parameter(raised, tensor.requires_grad) if is_parameter else raised
                )


def leaves_memory_unset(fn: Callable[[Tensor], Tensor]) -> bool:
    """Whether what `nn.Module._apply` is given is that of `to_empty`; torch has no other sign."""
    return getattr(fn, "__qualname__", "").startswith("Module.to_empty.")


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
