"""A tensor that ranks have written in pieces, read as if it were one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tensor_spec import TensorSpec


class Piece(NamedTuple):
    """A part of a tensor.

    Args:
        open: opens what can be sliced.
        offsets: where it begins in the tensor.
        spec: its shape and dtype.
    """

    open: Callable[[], AbstractContextManager[Any]]
    offsets: tuple[int, ...]
    spec: TensorSpec


class Pieces:
    """Pieces that lie behind one another along one dimension, and together are a tensor.

    Args:
        pieces: in any order.

    Raises:
        ValueError: they overlap, leave gaps, or are no tensor.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        pieces = [piece for piece in pieces if 0 not in piece.spec.shape] or list(pieces[:1])
        first = pieces[0]
        differing = [
            dim for dim in range(len(first.offsets)) if len({p.offsets[dim] for p in pieces}) > 1
        ]
        self._dim = differing[0] if differing else 0
        self._pieces = sorted(pieces, key=lambda piece: piece.offsets)
        end = self._check(len(differing))
        shape = list(first.spec.shape)
        if shape:
            shape[self._dim] = end
        self.spec = TensorSpec(tuple(shape), first.spec.dtype)

    def _check(self, dimensions: int) -> int:
        """Where the last piece ends."""
        first, end = self._pieces[0], 0
        for piece in self._pieces:
            shape, offsets = piece.spec.shape, piece.offsets
            rest = [
                (size, offset)
                for dim, (size, offset) in enumerate(zip(shape, offsets, strict=True))
                if dim != self._dim
            ]
            fits = [size for size, _ in rest] == [
                size for dim, size in enumerate(first.spec.shape) if dim != self._dim
            ]
            starts_there = not offsets or offsets[self._dim] == end or 0 in shape
            is_at_zero = all(offset == 0 for _, offset in rest)
            same_dtype = piece.spec.dtype == first.spec.dtype
            if dimensions > 1 or not (fits and starts_there and is_at_zero and same_dtype):
                raise ValueError("its pieces do not fit together")
            end += shape[self._dim] if shape else 0
        if not first.offsets and len(self._pieces) > 1:
            raise ValueError("its pieces do not fit together")
        return end

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        """What the slices, of steps of one, take of the tensor."""
        slices = [*(index if isinstance(index, tuple) else (index,))]
        slices += [slice(None)] * (len(self.spec.shape) - len(slices))
        start, stop, _ = slices[self._dim].indices(self.spec.shape[self._dim])
        parts = []
        for piece in self._pieces:
            offset, size = piece.offsets[self._dim], piece.spec.shape[self._dim]
            lower, upper = max(start - offset, 0), min(stop - offset, size)
            if lower < upper or not self.spec.shape[self._dim]:
                slices[self._dim] = slice(lower, upper)
                with piece.open() as content:
                    parts.append(content[tuple(slices)])
        if not parts:
            slices[self._dim] = slice(0, 0)
            with self._pieces[0].open() as content:
                parts.append(content[tuple(slices)])
        return torch.cat(parts, dim=self._dim) if len(parts) > 1 else parts[0]
