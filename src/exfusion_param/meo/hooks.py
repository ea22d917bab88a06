"""Hooks of a model whose linears are merged for each sample."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def kept_off_fast_paths(linears: Iterable[nn.Module]) -> list[Any]:
    """Hooks that do nothing: torch's Transformer layers read weights only where there are none."""
    return [linear.register_forward_pre_hook(_do_nothing) for linear in linears]


def _do_nothing(linear: nn.Module, args: Any) -> None:
    pass


def refuse_cache(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Raise where a forward continues a sequence whose segments are not known."""
    cache = kwargs.get("past_key_values")
    length = getattr(cache, "get_seq_length", lambda: 0)()
    if length:
        raise RuntimeError(
            "A causal model under meo.wrap gates each segment by the one before, which a cache of "
            "keys and values does not hold. Call generate(..., use_cache=False)."
        )
