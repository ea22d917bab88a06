"""Sums over the experts of a stack, some experts at a time.

Note [Slices of a stack]
A slice is small enough for a buffer that is written and read again at once, and so large that
calling a kernel takes no time beside running it. How a stack is sliced depends on its shape and
device only, so that a fused tensor has the same bits whenever it is fused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .precision import accumulation_dtype

SLICE = {"cpu": 1 << 22}
"""Numbers in a slice, by the type of the device."""
LARGE_SLICE = 1 << 24
"""Numbers in a slice on all other devices."""
_PRECISE = (torch.float32, torch.float64)


class RunningFusion:
    """A fused tensor that comes together as its experts pass.

    Args:
        fused: where to, shape (*S).
        weights: the fusion weights, shape (N,).
    """

    def __init__(self, fused: Tensor, weights: Tensor) -> None:
        dtype = accumulation_dtype(fused.dtype)
        self._fused = fused
        self._weights = weights.to(fused.device, dtype)
        is_direct = fused.dtype == dtype and fused.is_contiguous()
        self._sum = fused if is_direct else fused.new_empty(fused.shape, dtype=dtype)

    def add(self, experts: Tensor, part: slice) -> None:
        """Add the next experts, shape (n, *S), the part `part` of all."""
        flat, weights = _flat(experts, self._sum.dtype), self._weights[part]
        total = self._sum.view(-1)
        torch.addmv(total, flat.T, weights, beta=0 if part.start == 0 else 1, out=total)
        if part.stop == self._weights.shape[0] and self._sum is not self._fused:
            self._fused.copy_(self._sum)


def fuse_into(fused: Tensor, experts: Tensor, weights: Tensor) -> None:
    """Fuse a stack, as `RunningFusion` does.

    Args:
        fused: where to, shape (*S).
        experts: shape (N, *S).
        weights: shape (N,).
    """
    fusion = RunningFusion(fused, weights)
    for part in slices(experts):
        fusion.add(experts[part], part)


def products_with(experts: Tensor, gradient: Tensor) -> Tensor:
    """`<E_i, G>` for each expert, shape (N,), in float32 or float64.

    Args:
        experts: shape (N, *S).
        gradient: `G`, shape (*S).
    """
    is_summed_as_is = gradient.dtype == experts.dtype in _PRECISE
    if is_summed_as_is and experts.numel() <= SLICE.get(experts.device.type, LARGE_SLICE):
        return experts.flatten(1) @ gradient.flatten()  # without another call, as it is asked often
    dtype = accumulation_dtype(torch.promote_types(experts.dtype, gradient.dtype))
    flat = gradient.to(dtype).flatten()
    products = [_flat(experts[part], dtype) @ flat for part in slices(experts)]
    return products[0] if len(products) == 1 else torch.cat(products)


def _flat(experts: Tensor, dtype: torch.dtype) -> Tensor:
    """Experts as the rows of a matrix."""
    return experts.to(dtype).reshape(experts.shape[0], math.prod(experts.shape[1:]))


def slices(experts: Tensor) -> Iterator[slice]:
    """How a stack, shape (N, *S), is cut."""
    total = experts.shape[0]
    count = max(1, slice_size(experts.device) // max(1, math.prod(experts.shape[1:])))
    for start in range(0, total, count):
        yield slice(start, min(start + count, total))


def slice_size(device: torch.device) -> int:
    """Numbers in a slice; one expert may have more."""
    return SLICE.get(device.type, LARGE_SLICE)
