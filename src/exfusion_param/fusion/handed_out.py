"""Fused tensors that code outside of their linear has read, and whether it wrote to them.

What is handed out is remembered with a copy of its numbers, for as long as anybody but this module
holds it or a view of it. A write shows in its version counter, which `.data` has of its own, or in
its numbers. Zeros, which a memory bank that is still empty fuses to, are handed out as -0.0, for
`.data.zero_()` to leave a trace.

`torch._C._storage_Use_Count` is private; torch has no public way to see whether views are left.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..tensors.readable import can_be_read
from ..tensors.shards import local

# Not attributes of the modules, for a deepcopy not to take them along.
_handed_out: weakref.WeakKeyDictionary[nn.Module, list[_HandedOut]] = weakref.WeakKeyDictionary()
"""By the tensor's parametrization, what was read and may still be written to."""


class _HandedOut:
    """A fused tensor that someone outside of the linear has read.

    Args:
        tensor: what was handed out.
        keep: whether to keep it alive for as long as anyone else does, and until the next check, as
            an assignment to its `.data` shows in no other tensor. Within a forward it would hold
            on to the graph.
    """

    def __init__(self, tensor: Tensor, keep: bool) -> None:
        self.is_checked = False
        self._kept = tensor if keep else None
        self._tensor = weakref.ref(tensor)
        self._alias = local(tensor.detach())
        self._copy = self._alias.clone()
        self._version = _version(self._alias)

    def has_new_version(self) -> bool:
        """Whether it was written in place, or has other memory now; quicker than by its numbers."""
        tensor = self._tensor()
        if tensor is not None and local(tensor).data_ptr() != self._alias.data_ptr():
            return True
        return _version(self._alias) != self._version

    def was_written(self) -> bool:
        """Whether its numbers are others, or have been written again."""
        if self.has_new_version():
            return True
        now, before = self._alias, self._copy
        if not torch.equal(now.signbit(), before.signbit()):
            return True
        return not (torch.equal(now, before) or torch.equal(now.nan_to_num(), before.nan_to_num()))

    def is_held(self) -> bool:
        """Whether anyone else can still write to it."""
        if self._kept is not None and sys.getrefcount(self._kept) > _OWN_REFERENCES:
            return True
        self._kept = None
        if self._tensor() is not None:
            return True
        storage: Any = self._alias.untyped_storage()
        return torch._C._storage_Use_Count(storage._cdata) > 2  # that of `storage`, and the alias's


_OWN_REFERENCES = 2
"""Of a tensor that is kept: the attribute, and the argument of `sys.getrefcount`."""


def remember(fusion: nn.Module, fused: Tensor, *, is_in_forward: bool, is_empty: bool) -> None:
    """Remember a fused tensor that is about to be handed out."""
    if not can_be_read(fused):
        return
    if is_empty:
        local(fused.detach()).copysign_(fused.new_full((), -1.0))
    _handed_out.setdefault(fusion, []).append(_HandedOut(fused, keep=not is_in_forward))


def found_write(fusion: nn.Module, *, only_fresh: bool = False) -> bool:
    """Whether what was handed out was written to; tells of each write once.

    Args:
        fusion: the parametrization.
        only_fresh: compare the numbers only of what was not found unchanged before.
    """
    found = False
    for one in _handed_out.pop(fusion, ()):  # another thread may have been quicker
        is_quick = only_fresh and one.is_checked
        if one.has_new_version() if is_quick else one.was_written():
            found = True
        elif is_quick or one.is_held():  # a last write may only show in its numbers
            one.is_checked = True
            _handed_out.setdefault(fusion, []).append(one)
    return found


def is_any_handed_out() -> bool:
    """Whether there may be a write to find, in any model."""
    return bool(_handed_out)


def forget(fusion: nn.Module) -> None:
    """What was handed out so far counts no more."""
    _handed_out.pop(fusion, None)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
