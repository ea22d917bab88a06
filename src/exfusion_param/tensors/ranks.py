"""The ranks that train one model together, and what they tell each other.

Note [Which ranks]
Everything is reduced over the ranks that hold or feed the same parameters, which are all ranks of
the job only if it trains a single model. They are the ranks of a sharded weight's mesh, with those
that `wrap(..., process_group=)` was given. If it was given none, a plain weight takes those of the
DistributedDataParallel that runs its forward, or else all ranks of the job.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """Some ranks of a job.

    Args:
        groups: process groups of this rank, one for each dimension of the ranks' mesh; none for a
            single rank.
    """

    groups: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def __reduce__(self) -> Any:
        """A pickle, which another job may load, leaves process groups out."""
        return _unpickled, (len(self.groups) > 0,)

    @property
    def count(self) -> int:
        """How many ranks there are."""
        count = 1
        for group in self.groups:
            count *= distributed.get_world_size(group)
        return count

    def joined(self, other: Ranks) -> Ranks:
        """The ranks of two meshes, which have dimensions in common or are parts of one mesh."""
        if set(other.groups) <= set(self.groups):
            return self
        every = {g: set(distributed.get_process_group_ranks(g)) for g in self.groups + other.groups}
        kept: list[Any] = []
        for group in sorted(every, key=lambda group: -len(every[group])):
            if not any(every[group] <= every[larger] for larger in kept):
                kept.append(group)
        return Ranks(tuple(kept))

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
_LOST = Ranks((None,))  # those of an unpickled model


def _unpickled(had_groups: bool) -> Ranks:
    return _LOST if had_groups else ALONE


def ranks_of_groups(groups: Sequence[Any]) -> Ranks:
    """The ranks of process groups; `ALONE` if that is a single one."""
    several = tuple(group for group in groups if distributed.get_world_size(group) > 1)
    return Ranks(several) if several else ALONE


def ranks_in(process_group: Any) -> Ranks:
    """The ranks of a process group or a device mesh.

    Raises:
        TypeError: it is neither.
        ValueError: this rank is not in it.
    """
    if not has_ranks():
        raise ValueError("process_group needs torch.distributed.init_process_group() before.")
    if isinstance(process_group, distributed.ProcessGroup):
        return ranks_of_groups([process_group])
    is_mesh = hasattr(process_group, "get_coordinate")
    if not is_mesh and process_group != distributed.GroupMember.NON_GROUP_MEMBER:
        raise TypeError(
            "process_group must be a ProcessGroup or a DeviceMesh, got "
            f"{type(process_group).__name__}."
        )
    if not is_mesh or process_group.get_coordinate() is None:
        raise ValueError(
            f"Rank {distributed.get_rank()} is not in process_group. Give each rank the group of "
            "the ranks that train its model."
        )
    return ranks_of_groups([process_group.get_group(dim) for dim in range(process_group.ndim)])


def members_of(process_group: Any) -> list[int]:
    """The numbers in the job of the ranks of a process group or a device mesh; raises as above."""
    ranks_in(process_group)
    if isinstance(process_group, distributed.ProcessGroup):
        return sorted(distributed.get_process_group_ranks(process_group))
    members: list[int] = sorted(process_group.mesh.flatten().tolist())
    return members


def all_ranks() -> Ranks:
    """All ranks of the job."""
    return ranks_of_groups([distributed.group.WORLD]) if has_ranks() else ALONE


def ranks_of_ddp() -> Ranks | None:
    """The ranks of the DistributedDataParallel that runs a forward now, if one does.

    The attribute is private; torch's own compiler finds DDP by it, and there is no public way.
    """
    ddp: Any = DistributedDataParallel._active_ddp_module
    return None if ddp is None else ranks_of_groups([ddp.process_group])


def is_joining() -> bool:
    """Whether the DDP whose forward runs now lets ranks without data leave, by its `join()`."""
    ddp: Any = DistributedDataParallel._active_ddp_module
    return ddp is not None and ddp._join_config.enable


def require_known(ranks: Ranks, group: str) -> Ranks:
    """The ranks, unless a pickle has left them out in a job of several ranks."""
    if ranks is not _LOST or all_ranks() is ALONE:
        return ALONE if ranks is _LOST else ranks
    raise RuntimeError(
        f"The model of {group!r} was unpickled, which leaves the process group of its ranks out. "
        "Wrap a new model with wrap(..., process_group=group), and load the unpickled one's "
        "state_dict() into it."
    )


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


def has_ranks() -> bool:
    """Whether this process is a rank of a job."""
    return distributed.is_available() and distributed.is_initialized()
