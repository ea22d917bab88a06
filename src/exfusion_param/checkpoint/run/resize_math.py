"""Another number of experts for a checkpoint, with the fused weights as they were.

More experts: the new ones are copies of the dense weight that the old ones fuse to, as upcycling
has it. Fewer: experts side by side are fused, an expert in parts where numbers do not divide. With
`W = sum_i w_i E_i` both are `E' = A E` and `w'` with `w' A = w`:

- expand: `w'_i = w_i N/M` for the old experts, `s/M` for each new one, where `s = sum_i w_i`; the
  row of `A` for a new expert is `w / s`.
- reduce: new expert j takes the share `f_ji` of expert i by which `[j/M, (j+1)/M]` overlaps
  `[i/N, (i+1)/N]`: `w'_j = sum_i f_ji w_i`, `A_ji = f_ji w_i / w'_j`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...tensors.precision import accumulation_dtype


class Resize(NamedTuple):
    """How N experts become M.

    Args:
        weights: the new fusion weights `w'`, shape (M,).
        experts: `A`, shape (M, N).
        shares: by which all else is averaged, shape (M, N), of rows that sum to one.
    """

    weights: Tensor
    experts: Tensor
    shares: Tensor


def resize(weights: Tensor, count: int) -> Resize:
    """How the experts of fusion weights, shape (N,), become `count`, M.

    Raises:
        ValueError: fused experts would have no weight, as theirs cancel each other out.
    """
    weights = weights.double()
    return _expand(weights, count) if count > len(weights) else _reduce(weights, count)


def _expand(weights: Tensor, count: int) -> Resize:
    old, total = len(weights), weights.sum()
    if total.abs() < 1e-6 * weights.abs().sum():
        raise ValueError("its fusion weights sum to zero")
    uniform = torch.full_like(weights, 1 / old)
    fused = weights / total if weights.any() else uniform
    new = (total / count).expand(count - old)
    experts, shares = (
        torch.cat([torch.eye(old, dtype=weights.dtype), row.expand(count - old, old)])
        for row in (fused, uniform)
    )
    return Resize(torch.cat([weights * old / count, new]), experts, shares)


def _reduce(weights: Tensor, count: int) -> Resize:
    old = len(weights)
    starts = torch.arange(count, dtype=weights.dtype).unsqueeze(1) * old / count
    lower = torch.arange(old, dtype=weights.dtype)
    ends = torch.minimum(starts + old / count, lower + 1)
    overlaps = (ends - torch.maximum(starts, lower)).clamp(min=0)  # (M, N)
    shares = overlaps / overlaps.sum(dim=1, keepdim=True)
    taken = overlaps * weights
    fused = taken.sum(dim=1)
    if (fused.abs() < 1e-6 * taken.abs().sum(dim=1)).any():
        raise ValueError("fusion weights of experts to be fused sum to zero")
    is_empty = (fused == 0).unsqueeze(1)
    return Resize(fused, torch.where(is_empty, shares, taken / fused.unsqueeze(1)), shares)


def apply(matrix: Tensor, tensor: Tensor) -> Tensor:
    """A matrix, shape (M, N), times this rank's part of a stack, shape (N, *S)."""
    dtype = torch.promote_types(accumulation_dtype(tensor.dtype), torch.float32)
    flat = tensor.reshape(len(tensor), -1).to(dtype)
    return (matrix.to(flat) @ flat).reshape(-1, *tensor.shape[1:])
