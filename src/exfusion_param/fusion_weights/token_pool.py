"""Fusion weights that pool over tokens, and what tells padding from them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..finding.place import PlaceInGroup
from .base import FusionWeights


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an FFN's input has its tokens, where shapes do not tell.

    Args:
        tokens_first: (tokens, batch, D), as in torch's layers by default.
        pads: the model pads the tokens at their end, to a multiple of its window.
    """

    tokens_first: bool = False
    pads: bool = False


def laid_out(mask: Tensor, shape: Sequence[int], layout: Layout) -> Tensor | None:
    """A mask, shape (batch, tokens), as an input of `shape` has its tokens, or None."""
    if mask.ndim != 2:
        is_one_sample = tuple(shape) == (1, *mask.shape)
        return mask.reshape(shape) if is_one_sample or mask.shape == torch.Size(shape) else None
    batch, tokens = mask.shape
    is_transposed = layout.tokens_first or (batch, tokens) != tuple(shape)
    if is_transposed and tuple(shape) == (tokens, batch):
        return mask.mT
    if tuple(shape) == (batch * tokens,):
        return (mask.mT if layout.tokens_first else mask).flatten()
    if layout.pads and len(shape) == 2 and shape[0] == batch and shape[1] > tokens:
        return nn.functional.pad(mask, (0, shape[1] - tokens))
    if len(shape) > 1 and shape[0] == batch and math.prod(shape[1:]) == tokens:
        return mask.reshape(shape)
    return None


class TokenPool(FusionWeights):
    """Fusion weights that follow the input of an FFN, and leave padding out."""

    has_given_mask = False  # by the `token_mask` that runs, which comes before a model's own
    pools_in_eval = False
    token_mask: Tensor | None = None  # of the running forward
    layout: Layout = Layout()
    _traced: Tensor | None = None  # `current` while torch.compile traces

    def __getstate__(self) -> dict[str, Any]:
        """The state that a deepcopy includes, without the running forward and stale handles."""
        handles = [handle for handle in self.handles if handle.hooks_dict_ref() is not None]
        return super().__getstate__() | {"token_mask": None, "_running": {}, "handles": handles}

    @property
    def current(self) -> Tensor | None:
        """The fusion weights of this thread's running forward."""
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
        return self.__dict__.setdefault("_running", {})

    def runs(self, place: PlaceInGroup) -> bool:
        """All of the group's linears."""
        return True

    def end_forward(self) -> None:
        """The group's forward is over."""
        if torch.compiler.is_compiling():
            self.remember("_traced", None)
        else:
            self._by_thread().pop(threading.get_ident(), None)

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

    def every(self, stride: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Every so many tokens of each sample of x, shape (..., D), and their token mask."""
        mask = self.mask_for(x)
        if stride == 1 or x.ndim == 1:
            return x, mask
        if self.layout.tokens_first:
            return x[::stride], None if mask is None else mask[::stride]
        return x[..., ::stride, :], None if mask is None else mask[..., ::stride]

    def mask_for(self, x: Tensor, *, is_moved: bool = False) -> Tensor | None:
        """The token mask as x has its tokens, or None if it does not say which of them count.

        Args:
            x: shape (batch, tokens, D) or (tokens, batch, D), with tokens in several dimensions, or
                all in one.
            is_moved: whether it is (batch, ...) now, whatever the layout of the FFN's input.

        Returns:
            The mask, shape (...) of x without its features.
        """
        if self.token_mask is None:
            return None
        layout = dataclasses.replace(self.layout, tokens_first=False) if is_moved else self.layout
        mask = laid_out(self.token_mask, x.shape[:-1], layout)
        if mask is None:
            self._warn_of_unused(x)
        return mask

    def _warn_of_unused(self, x: Tensor) -> None:
        mask = self.token_mask
        assert mask is not None
        if torch.compiler.is_compiling() or (mask.device.type == "cpu" and bool(mask.all())):
            return  # nothing is masked; looking at it would synchronize a GPU
        warnings.warn(
            f"A token mask of shape {tuple(mask.shape)} does not fit an FFN's input of shape "
            f"{tuple(x.shape)}, so all of its tokens count for the router, padding too. Run the "
            "FFN on (batch, tokens, D), not in chunks, or give exf.token_mask(model, mask) one of "
            "(batch, tokens) of these tokens.",
            stacklevel=2,
        )


@contextlib.contextmanager
def token_mask(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Exclude padding from the routers of a model, inside a `with` block.

        with exf.token_mask(model, mask):
            loss = loss_fn(model(x), y)
            loss.backward()

    Models of transformers do not need this call: they use the `attention_mask` that is passed to
    them if its shape is (batch, tokens). Nor do modules that take a `key_padding_mask`, as torch's
    do. This mask takes precedence over theirs. With activation checkpointing, run the backward
    inside the block as well, because it repeats forwards.

    Args:
        model: a wrapped model.
        mask: shape (batch, tokens), true or 1 for tokens, false or 0 for padding. It also applies
            to FFNs whose input is (tokens, batch, D). An FFN with other tokens, as in a vision
            tower, ignores the mask, with a warning.

    Raises:
        TypeError: the mask is not a tensor.
        ValueError: the model has no router, or the mask has other values than these.

    Examples:
        >>> model = exf.wrap(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
        >>> mask = torch.tensor([[1, 1, 1], [1, 0, 0]])  # the second sample is one token long
        >>> with exf.token_mask(model, mask):
        ...     model(torch.randn(2, 3, 8)).sum().backward()
    """
    pools = [module for module in model.modules() if isinstance(module, TokenPool)]
    if not pools:
        raise ValueError(f"{type(model).__name__} has no router, so nothing pools over tokens.")
    _require_flags(mask)
    before = [(pool.token_mask, pool.has_given_mask) for pool in pools]
    for pool in pools:
        pool.token_mask, pool.has_given_mask = mask, True
    try:
        yield
    finally:
        for pool, previous in zip(pools, before, strict=True):
            pool.token_mask, pool.has_given_mask = previous


def _require_flags(mask: Tensor) -> None:
    """Raise unless a mask has just 1 and 0; one of integers on a GPU is not looked at."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"A token mask must be a tensor, got {type(mask).__name__}.")
    is_known = mask.dtype == torch.bool or mask.is_meta or torch.compiler.is_compiling()
    if is_known or not (mask.is_floating_point() or mask.device.type == "cpu"):
        return
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            "A token mask has 1 (or true) where a token counts and 0 (or false) for padding, got "
            f"values from {mask.min().item():g} to {mask.max().item():g}. Of an additive mask take "
            "mask == 0, of lengths torch.arange(tokens) < lengths[:, None]."
        )
