"""The ranks that train one model together, and what they tell each other."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

_own_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Some ranks of a job.

    Args:
        groups: process groups, one for each dimension of the device mesh; none for a single rank.
        replicas: how many of the ranks hold the same part of an expert stack.
    """

    groups: tuple[Any, ...] = ()
    replicas: int = 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    @property
    def count(self) -> int:
        """How many ranks there are."""
        count = 1
        for group in self.groups:
            count *= distributed.get_world_size(group)
        return count

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, in place."""
        for group in self.groups:
            distributed.all_reduce(tensor, group=group)
        return tensor

    def apart(self) -> Ranks:
        """The same ranks with process groups that nothing else uses.

        Made at the first call, which all of the ranks have to take part in.
        """
        return dataclasses.replace(self, groups=tuple(_own_group(group) for group in self.groups))

    def broadcast(self, tensor: Tensor) -> None:
        """Give every rank the tensor of the first one, in place."""
        for group in self.groups:
            distributed.broadcast(tensor, group_src=0, group=group)

    def gather(self, value: Any) -> list[Any]:
        """A plain value from every rank."""
        values = [value]
        for group in self.groups:
            gathered: list[Any] = [None] * distributed.get_world_size(group)
            distributed.all_gather_object(gathered, values, group=group)
            values = [value for part in gathered for value in part]
        return values


def _own_group(group: Any) -> Any:
    own = _own_groups.get(group)
    if own is None:
        ranks = distributed.get_process_group_ranks(group)
        own = distributed.new_group(ranks, use_local_synchronization=True)
        _own_groups[group] = own
    return own


ALONE = Ranks()


def all_ranks() -> Ranks:
    """All ranks of the job, each of them with whole expert stacks, as under DDP."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return ALONE
    count = distributed.get_world_size()
    return Ranks((distributed.group.WORLD,), replicas=count) if count > 1 else ALONE


def sum_together(ranks: Ranks, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums over the ranks of several small tensors, in one all-reduce.

    Returns:
        For each tensor its sum, flat, on the device of the first one.
    """
    if ranks is ALONE or not sum(tensor.numel() for tensor in tensors):
        return [tensor.flatten() for tensor in tensors]
    device = tensors[0].device
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    flat = ranks.sum(torch.cat([tensor.flatten().to(device, dtype) for tensor in tensors]))
    return list(flat.split([tensor.numel() for tensor in tensors]))
