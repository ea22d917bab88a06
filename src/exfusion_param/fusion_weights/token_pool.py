"""Fusion weights that pool over tokens, and what tells padding from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import FusionWeights


class TokenPool(FusionWeights):
    """Fusion weights that follow the input of an FFN, and leave padding out."""

    token_mask: Tensor | None = None  # of the running forward, see token_masks.py
    current: Tensor | None = None  # what the linears of the running forward fuse with

    def __getstate__(self) -> dict[str, Any]:
        """What a deepcopy takes along: not the running forward."""
        return self.__dict__ | {"token_mask": None, "current": None}

    def release(self) -> None:
        """The group's forward is over."""
        self.remember("current", None)

    def remember(self, name: str, value: Any) -> None:
        """Set an attribute within a forward, also within one that is compiled."""
        if torch.compiler.is_compiling():
            # torch.compile refuses attributes that are set within activation checkpointing, as its
            # backward does not set them anew. `current` is None again when the forward is over. The
            # function is private, and torch's only way to say so for one attribute.
            torch._dynamo.utils._disable_side_effect_safety_checks_for_current_subtracer(
                setattr, self, name, value
            )
        else:
            setattr(self, name, value)

    def mask_for(self, x: Tensor) -> Tensor | None:
        """The token mask if it speaks of the tokens of x, also where these are in one dimension."""
        mask = self.token_mask
        if mask is None or mask.numel() * x.shape[-1] != x.numel():
            return None
        return mask
