"""The ranks that write and read a checkpoint together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed

from ...tensors.arrival import await_members
from ...tensors.ranks import members_of
from .errors import CheckpointError

T = TypeVar("T")


class Processes:
    """Ranks of a job, or only this process where torch.distributed was not initialized.

    They talk over a gloo group of their own, so that a thread can write while the others train.

    Args:
        members: their numbers in the job, ascending; None takes all. They make this together.

    Raises:
        RuntimeError: some of them do not.
    """

    def __init__(self, members: Sequence[int] | None = None) -> None:
        self.members, self.rank, self.group = [0], 0, None
        if distributed.is_available() and distributed.is_initialized():
            self.members = list(range(distributed.get_world_size()) if members is None else members)
            self.rank = self.members.index(distributed.get_rank())
        if len(self.members) > 1:
            await_members(self.members, "checkpoints")
            self.group = distributed.new_group(
                self.members, backend="gloo", use_local_synchronization=True
            )

    @classmethod
    def of(cls, process_group: Any) -> Processes:
        """The ranks of a process group or device mesh; None takes all of the job.

        Raises:
            TypeError: it is neither.
            ValueError: this rank is not in it.
        """
        return cls(None if process_group is None else members_of(process_group))

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self.members)

    def gather(self, value: Any) -> list[Any]:
        """A plain value from every rank."""
        values = [value] * self.count
        if self.group is not None:
            distributed.all_gather_object(values, value, group=self.group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        if self.group is None:
            return flag
        any_flag = torch.tensor(flag, dtype=torch.uint8)
        distributed.all_reduce(any_flag, distributed.ReduceOp.MAX, self.group)
        return bool(any_flag)

    def each(self, work: Callable[[], T]) -> T:
        """Return the result of this rank's work.

        Raises:
            CheckpointError: a rank failed; every rank raises.
        """
        caught = None
        try:
            result = work()
        except Exception as error:
            caught = error
        for rank, words in enumerate(self.gather(None if caught is None else _in_words(caught))):
            if words is not None:
                is_known = self.count == 1 or "(rank " in words
                where = "" if is_known else f" (rank {self.members[rank]})"
                raise CheckpointError(f"{words}{where}") from caught
        return result

    def together(self, work: Callable[[], T]) -> list[T]:
        """Return the results of every rank's work; raises as `each` does."""
        return self.gather(self.each(work))

    def on_first(self, work: Callable[[], T]) -> T:
        """Return the result of rank 0's work on every rank; raises as `each` does."""
        return self.together(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]


def _in_words(error: Exception) -> str:
    return str(error) or type(error).__name__
