"""The position of a linear in its FFN."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .projections import Projection


@dataclasses.dataclass(frozen=True)
class PlaceInGroup:
    """The position of a linear in its FFN group.

    Args:
        projection: what it maps.
        index: which of them it is, in the order in which they run.
        is_first: runs first, and its weight owns the fusion weights.
        reads_input: reads the FFN's input, as the first one does, and gate and value alike.
        is_last: runs last.
    """

    projection: Projection
    index: int
    is_first: bool
    reads_input: bool
    is_last: bool


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a linear's call; of a nested tensor its tokens, shape (tokens, D)."""
    x = args[0] if args else next(iter(kwargs.values()))
    return torch.cat(x.unbind()) if isinstance(x, Tensor) and x.is_nested else x
