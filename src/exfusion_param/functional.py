"""The mathematics of ExFusion as pure functions on tensors.

Equation numbers are those of ExFusion (Ruan et al., 2026, arXiv 2603.27965). Symbols: N experts,
`E` the expert stack, `w` the fusion weights, `m` the memory bank, `delta` its momentum, `G` the
router, D the FFN's input features.

All functions compute in float32 at least, whatever autocast says: bfloat16 has 8 bits, and a
fused weight summed in it would lose what the experts differ by. The sum is cast once, at the end.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F


def fuse(experts: Tensor, weights: Tensor) -> Tensor:
    """Fuse an expert stack into one tensor: `W = sum_i w_i E_i` (Eq. 7).

    Args:
        experts: `E`, shape (N, *S), any floating dtype.
        weights: `w`, shape (N,).

    Returns:
        The fused tensor, shape (*S), in the dtype of `experts`.
    """
    dtype = accumulation_dtype(experts.dtype)
    with _without_autocast(experts.device):
        # tensordot is a matrix-vector product over the flat stack: ten times faster on a CPU than
        # a broadcast product and a sum, and its backward keeps no copy of the stack.
        return torch.tensordot(weights.to(experts.device, dtype), experts.to(dtype), dims=1).to(
            experts.dtype
        )


def route(x: Tensor, router: Tensor, mask: Tensor | None = None) -> Tensor:
    """The current fusion weights, `w = mean over tokens and samples of softmax(G(x))` (Eq. 10).

    The softmax is taken for each token and the mean after it, which is how the paper reads.

    Args:
        x: input of the FFN, shape (..., D), at least one token.
        router: weight of `G`, shape (N, D).
        mask: shape (...), true or non-zero where a token counts; None counts all, and so does a
            mask that leaves none.

    Returns:
        `w`, shape (N,), summing to one, in the dtype of `router`.
    """
    with _without_autocast(x.device):
        logits = F.linear(x.to(router.dtype), router)  # (..., N)
        shares = logits.softmax(dim=-1).reshape(-1, len(router))  # (tokens, N)
        if mask is None:
            return shares.mean(dim=0)
        counts = (mask != 0).flatten().to(shares.dtype)  # (tokens,)
        counts = torch.where(counts.any(), counts, torch.ones_like(counts))
        return (counts / counts.sum()) @ shares


def update_bank(bank: Tensor, weights: Tensor, momentum: float) -> Tensor:
    """Move the memory bank: `m <- delta m + (1 - delta) w` (Eq. 11).

    Args:
        bank: `m`, shape (N,).
        weights: the current `w`, shape (N,).
        momentum: `delta`.

    Returns:
        The new bank, shape (N,). The gradient flows into `weights`.
    """
    return momentum * bank + (1 - momentum) * weights


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in: float32, or float64 for float64 experts."""
    return torch.promote_types(dtype, torch.float32)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    if not torch.amp.is_autocast_available(device.type):  # such as "meta"
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
