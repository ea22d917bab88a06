"""The ranks that write and read a checkpoint together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed

from .errors import CheckpointError

T = TypeVar("T")


class Processes:
    """All ranks of the job, or only this process where torch.distributed was not initialized.

    They talk over a gloo group of their own, so that a thread can write while the others train.
    """

    def __init__(self) -> None:
        self.rank, self.count, self.group = 0, 1, None
        if distributed.is_available() and distributed.is_initialized():
            self.rank, self.count = distributed.get_rank(), distributed.get_world_size()
        if self.count > 1:
            self.group = distributed.new_group(backend="gloo")

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

    def together(self, work: Callable[[], T]) -> list[T]:
        """What each rank's work gives.

        Raises:
            CheckpointError: a rank failed; every rank raises.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        answers = self.gather((result, None if error is None else _in_words(error)))
        for rank, (_, words) in enumerate(answers):
            if words is not None:
                where = f" (rank {rank})" if self.count > 1 else ""
                raise CheckpointError(f"{words}{where}") from error
        return [answer for answer, _ in answers]

    def on_first(self, work: Callable[[], T]) -> T:
        """What rank 0's work gives, on every rank; raises as `together` does."""
        return self.together(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]


def _in_words(error: Exception) -> str:
    return str(error) or type(error).__name__
