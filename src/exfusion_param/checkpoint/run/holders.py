"""Which ranks hold which part of a run: all of them, or those of one pipeline stage."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..files.processes import Processes
from .parts import Part


class Holders:
    """The ranks of each part; a part is one thing on all ranks that name it.

    Args:
        parts: of this rank.
        processes: all ranks of the run, which make this together.

    Raises:
        ValueError: on every rank, if a part is of different things.
    """

    def __init__(self, parts: Sequence[Part], processes: Processes) -> None:
        own = {part.name: _digest(part.holds()) for part in parts}
        every: list[dict[str, str]] = processes.gather(own)
        self.ranks = {
            name: [rank for rank, digests in enumerate(every) if name in digests]
            for name in sorted({name for digests in every for name in digests})
        }
        """Their numbers within the run's, by the part's name."""
        self._run = processes
        for name, ranks in self.ranks.items():
            _refuse_different(name, ranks, [every[rank][name] for rank in ranks])
        groups: dict[tuple[int, ...], Processes] = {tuple(range(processes.count)): processes}
        for name in sorted(own):  # in one order on all ranks, as groups are made together
            members = tuple(self.ranks[name])
            if members not in groups:
                groups[members] = Processes([processes.members[rank] for rank in members])
        self.processes = {name: groups[tuple(self.ranks[name])] for name in sorted(own)}
        """For each part of this rank those that hold it, in one order on all ranks."""

    def described(self) -> dict[str, list[int]]:
        """For the manifest: the ranks of the parts that some ranks lack."""
        return {name: ranks for name, ranks in self.ranks.items() if len(ranks) < self._run.count}

    def each(self, work: Callable[[str, Processes], None]) -> None:
        """Do some work for each part of this rank, together with the ranks that hold it.

        Raises:
            CheckpointError: a rank failed; every rank raises.
        """
        self._run.each(lambda: self._do(work))

    def _do(self, work: Callable[[str, Processes], None]) -> None:
        failed: list[Exception] = []
        for name, those in self.processes.items():
            try:
                work(name, those)
            except Exception as error:  # the next ones are tried, as other ranks wait for them
                failed.append(error)
        if failed:
            raise failed[0]


def saved_by(name: str, manifest: Mapping[str, Any]) -> Sequence[int]:
    """The numbers of the ranks that have saved a part."""
    ranks: Sequence[int] = manifest.get("holders", {}).get(name, range(manifest["ranks"]))
    return ranks


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _refuse_different(name: str, ranks: Sequence[int], digests: Sequence[str]) -> None:
    for rank, digest in zip(ranks, digests, strict=True):
        if digest != digests[0]:
            raise ValueError(
                f"{name!r} holds other tensors on rank {rank} than on rank {ranks[0]}. A part is "
                "one thing on all ranks that name it: give each pipeline stage, and its optimizer, "
                'names of their own, such as f"stage-{index}", and each of several models its own '
                "Checkpoints(..., process_group=group)."
            )
