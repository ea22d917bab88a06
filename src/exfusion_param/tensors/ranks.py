"""The ranks that train one model together, and what they tell each other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed


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
