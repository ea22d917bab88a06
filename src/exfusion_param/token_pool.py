"""Fusion weights that pool over tokens, and what tells padding from them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .fusion_weights import FusionWeights


class TokenPool(FusionWeights):
    """Fusion weights that follow the input of an FFN, and leave padding out."""

    token_mask: Tensor | None = None  # of the running forward, see token_mask.py

    def __getstate__(self) -> dict[str, Any]:
        """What a deepcopy takes along: not the running forward."""
        return self.__dict__ | {"token_mask": None}

    def mask_for(self, x: Tensor) -> Tensor | None:
        """The token mask if it speaks of the tokens of x, also where these are in one dimension."""
        mask = self.token_mask
        if mask is None or mask.numel() * x.shape[-1] != x.numel():
            return None
        return mask
