"""The input of gates: the mean of a sample's tokens, or of the previous segment.

Note [Segments]
The mean of a whole sequence lets each token see all later ones. A causal model is merged by
segments instead, each by the mean of the one before (Lory, Zhong et al., 2024, arXiv 2405.03133).
The first segment has none before it. Lory gates it by its own mean, without a gradient; the tokens
of a segment would then still see later ones. So we gate it by the first token, without a gradient.

Padding may stand before a sequence, after it, or within. With a mask the tokens that count are
moved together first, so that the same tokens make the same segments wherever padding stands.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F


def mean_of_tokens(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over tokens, shape (..., D), in float32 at least.

    Args:
        x: shape (..., T, D).
        mask: shape (..., T), true or non-zero where a token counts; None counts all. A sample
            without any has a mean of zero.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if mask is None:
        return x.sum(dim=-2) / max(1, x.shape[-2])
    counts = (mask != 0).to(x.dtype)
    return (counts.unsqueeze(-2) @ x).squeeze(-2) / counts.sum(dim=-1, keepdim=True).clamp(min=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Segments:
    """A batch cut into segments of equal length.

    Args:
        x: shape (B, segments, length, D); the last segment ends with zeros.
        pooled: what gates each segment, shape (B, segments, D).
        order: where each token was before padding moved behind, shape (B, T), or None.
        tokens: T.
    """

    x: Tensor
    pooled: Tensor
    order: Tensor | None
    tokens: int

    def joined(self, y: Tensor) -> Tensor:
        """The tokens, (B, T, out), in their first places, of (B, segments, length, out)."""
        y = y.flatten(1, 2)[:, : self.tokens]
        if self.order is None:
            return y
        return torch.empty_like(y).scatter(1, self.order.unsqueeze(-1).expand_as(y), y)


def segments_of(x: Tensor, length: int, mask: Tensor | None = None) -> Segments:
    """Cut sequences into segments, see Note [Segments].

    Args:
        x: shape (B, T, D).
        length: tokens of a segment.
        mask: shape (B, T), true or non-zero where a token counts; None counts all.
    """
    tokens, order = x.shape[1], None
    if mask is not None:
        is_token = mask != 0
        order = torch.argsort((~is_token).to(torch.int8), dim=1, stable=True)
        x = x.gather(1, order.unsqueeze(-1).expand_as(x))
        mask = is_token.gather(1, order)
    count = max(1, -(-tokens // length))
    behind = count * length - tokens
    x = F.pad(x, (0, 0, 0, behind)).unflatten(1, (count, length))
    counts = x.new_ones(len(x), tokens) if mask is None else mask.to(x.dtype)
    means = mean_of_tokens(x, F.pad(counts, (0, behind)).unflatten(1, (count, length)))
    first = x[:, :1, 0].detach().to(means.dtype)
    return Segments(x, torch.cat([first, means[:, :-1]], dim=1), order, tokens)
