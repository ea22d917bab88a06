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
    shares = _expanding(len(weights), count) if count > len(weights) else _reducing(weights, count)
    if count > len(weights):
        total = weights.sum()
        if total.abs() < 1e-6 * weights.abs().sum():
            raise ValueError("its fusion weights sum to zero")
        mean = weights / total if weights.any() else shares[-1]
        experts = shares.clone()
        experts[len(weights) :] = mean
        new = (total / count).expand(count - len(weights))
        return Resize(torch.cat([weights * len(weights) / count, new]), experts, shares)
    taken = shares * weights
    fused = taken.sum(dim=1)
    if (fused.abs() < 1e-6 * taken.abs().sum(dim=1)).any():
        raise ValueError("fusion weights of experts to be fused sum to zero")
    is_empty = (fused == 0).unsqueeze(1)
    experts = torch.where(is_empty, shares / shares.sum(1, True), taken / fused.unsqueeze(1))
    return Resize(fused, experts, shares / shares.sum(dim=1, keepdim=True))


def _expanding(old: int, new: int) -> Tensor:
    rows = torch.full((new - old, old), 1 / old, dtype=torch.float64)
    return torch.cat([torch.eye(old, dtype=torch.float64), rows])


def _reducing(weights: Tensor, new: int) -> Tensor:
    """The share of each old expert, shape (N,), that each new one takes, shape (M, N)."""
    old = len(weights)
    starts = torch.arange(new, dtype=torch.float64).unsqueeze(1) * old / new
    lower = torch.arange(old, dtype=torch.float64)
    ends = torch.minimum(starts + old / new, lower + 1)
    return (ends - torch.maximum(starts, lower)).clamp(min=0)


def apply(matrix: Tensor, tensor: Tensor) -> Tensor:
    """A matrix, shape (M, N), times this rank's part of a stack, shape (N, *S)."""
    dtype = torch.promote_types(accumulation_dtype(tensor.dtype), torch.float32)
    flat = tensor.reshape(len(tensor), -1).to(dtype)
    return (matrix.to(flat) @ flat).reshape(-1, *tensor.shape[1:])
