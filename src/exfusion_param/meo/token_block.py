"""The residual block through which each token goes before a linear, at the token level."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..tensors.shards import assign

REDUCTION = 64
"""How much narrower than its input the block is."""


class TokenBlock(nn.Module):
    """`x + W_up relu(W_down x)`, which is x at the start, as W_up is zero.

    Args:
        features: D.
        device: of its weights.
        dtype: of its weights.
    """

    def __init__(self, features: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        width = max(1, features // REDUCTION)
        self.down = nn.Parameter(torch.empty(width, features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(features, width, device=device, dtype=dtype))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw W_down as `nn.Linear` does, and set W_up to zero."""
        down = torch.empty(self.down.shape, dtype=self.down.dtype, device=self.down.device)
        bound = 1 / math.sqrt(down.shape[1])
        assign(self.down, nn.init.uniform_(down, -bound, bound, generator=generator))
        nn.init.zeros_(self.up)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., D) to the same shape."""
        hidden = F.linear(x, self.down.to(x.dtype)).relu()
        return x + F.linear(hidden, self.up.to(x.dtype)).to(x.dtype)
