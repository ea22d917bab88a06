"""Fusion weights that pool over tokens, and what tells padding from them."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from .base import FusionWeights


class TokenPool(FusionWeights):
    """Fusion weights that follow the input of an FFN, and leave padding out."""

    token_mask: Tensor | None = None  # of the running forward, see token_masks.py
    _traced: Tensor | None = None  # `current` while torch.compile traces

    def __getstate__(self) -> dict[str, Any]:
        """What a deepcopy takes along: not the running forward, nor handles of a model gone."""
        handles = [handle for handle in self.handles if handle.hooks_dict_ref() is not None]
        return super().__getstate__() | {"token_mask": None, "_running": {}, "handles": handles}

    @property
    def current(self) -> Tensor | None:
        """What the linears of this thread's running forward fuse with."""
        if torch.compiler.is_compiling():
            return self._traced
        return self._by_thread().get(threading.get_ident())

    @current.setter
    def current(self, value: Tensor | None) -> None:
        if torch.compiler.is_compiling():
            self.remember("_traced", value)
        elif value is None:
            self._by_thread().pop(threading.get_ident(), None)
        else:
            self._by_thread()[threading.get_ident()] = value

    def _by_thread(self) -> dict[int, Tensor]:
        running: dict[int, Tensor] = self.__dict__.setdefault("_running", {})
        return running

    def end_forward(self) -> None:
        """The group's forward is over."""
        self.current = None

    def remember(self, name: str, value: Any) -> None:
        """Set an attribute within a forward, also within one that is compiled."""
        if torch.compiler.is_compiling():
            # torch.compile refuses attributes that are set within activation checkpointing, as its
            # backward does not set them again. `current` is None again when the forward is over.
            # The function is private, and torch's only way to say so for one attribute.
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
