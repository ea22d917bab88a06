"""Looks at the attention of a model's first forward, for gates that would show tokens later ones.

A user's own attention may hide later tokens by an argument or a mask; its modules say nothing. A
gate that pools over all tokens would let the FFN behind it see them again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..tensors.readable import is_capturing, is_transformed

HIDDEN = -1e4
"""A score from which on a token is taken to be hidden; masks add this or less."""


class AttentionWatch:
    """Watches forwards until one that runs in eager mode has attended to several tokens."""

    def __init__(self, is_needed: bool) -> None:
        self._is_over = not is_needed
        self._has_looked = False
        self._running: dict[int, _Mode] = {}  # by thread

    def begin(self) -> None:
        """A forward begins."""
        if not self._is_over and threading.get_ident() not in self._running:
            self._running[threading.get_ident()] = mode = _Mode()
            mode.__enter__()

    def end(self) -> None:
        """A forward is over."""
        if mode := self._running.pop(threading.get_ident(), None):
            mode.__exit__(None, None, None)
            self._is_over = self._has_looked

    def require_open(self, gate: Any, tokens: int) -> None:
        """Raise if a gate is about to pool over tokens that the attention before it hides.

        Raises:
            RuntimeError: the attention is causal, and nobody has said what the gate should be.
        """
        if torch.compiler.is_compiling():
            return
        if not (mode := self._running.get(threading.get_ident())):
            return
        hides, mode.hides_later = mode.hides_later, False
        self._has_looked |= tokens > 1
        if hides and not gate.is_causal and gate.config.causal is None:
            self._has_looked = False
            raise RuntimeError(
                f"The attention before {gate.group!r} hides later tokens, and its gates pool over "
                "all tokens, so that each would see later ones. Wrap the model with causal=True; "
                "or with causal=False, if that is intended."
            )


class _Mode(TorchFunctionMode):
    hides_later = False  # an attention since the last FFN did

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ATTENTION:
            self.hides_later |= _ATTENTION[func](args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _in_product(args: Any, kwargs: Any) -> bool:
    mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
    is_causal = kwargs.get("is_causal", args[5] if len(args) > 5 else False)
    return bool(is_causal and _length(args[0] if args else kwargs["query"], 2) > 1) or _hides_later(
        mask, hidden_is=False
    )


def _in_multi_head(args: Any, kwargs: Any) -> bool:
    return _hides_later(kwargs.get("attn_mask"), hidden_is=True)


def _in_softmax(args: Any, kwargs: Any) -> bool:
    return _hides_later(args[0] if args else kwargs.get("input"), hidden_is=True)


_ATTENTION: dict[Any, Callable[[Any, Any], bool]] = {
    F.scaled_dot_product_attention: _in_product,
    F.multi_head_attention_forward: _in_multi_head,
    F.softmax: _in_softmax,
    torch.softmax: _in_softmax,
    Tensor.softmax: _in_softmax,
}


def _length(tensor: Tensor, from_end: int) -> int:
    return tensor.shape[-from_end] if tensor.ndim >= from_end else 1


def _hides_later(mask: Any, hidden_is: bool) -> bool:
    """Whether a mask or scores, shape (..., T, T), hide all later tokens, and not all tokens.

    Args:
        mask: booleans, or numbers that are added to scores or are scores.
        hidden_is: what a boolean is where a token is hidden.
    """
    if type(mask) not in (Tensor, nn.Parameter) or mask.ndim < 2 or mask.numel() == 0:
        return False
    if mask.shape[-1] != mask.shape[-2] or mask.shape[-1] == 1 or mask.is_meta:
        return False
    if is_transformed(mask) or is_capturing(mask):
        return False
    mask = mask.detach()
    hidden = (mask == hidden_is) if mask.dtype == torch.bool else mask <= HIDDEN
    later = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    return bool(hidden[..., later].all()) and not bool(hidden.all())
