"""The checkpoints of a run: what it saves while it trains, and continues from.

A checkpoint holds, in a folder of its own (run_folder.py):

    manifest.json            versions, the step, and size and SHA-256 of every file
    model/, optimizer/, ...  tensors by torch's distributed checkpoints (tensor_files.py)
    ranks/                   what each rank has for itself (rank_files.py)
"""

from __future__ import annotations

import functools
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..files.errors import CheckpointError
from ..files.manifest import read_manifest, write_manifest
from ..files.processes import Processes
from ..files.rank_files import read_rank, write_rank
from ..files.run_folder import RunFolder
from ..files.tensor_files import read_tensors, stored_tensors, write_tensors
from .holders import Holders, for_each, saved_by
from .optimizer_part import OptimizerPart
from .parts import Module, Part
from .resizing import ResizedModule, ResizedOptimizer
from .snapshot import Captured, Plan, load_all, parts_of

Read = Callable[[int], dict[str, Any]]
"""The values of a rank's parts, by its number."""


class Checkpoints:
    """Saves a run, and resumes it bit by bit.

        checkpoints = Checkpoints("run", {"model": model, "optimizer": optimizer})
        for step in range(checkpoints.resume(), steps):
            ...
            if (step + 1) % 100 == 0:
                checkpoints.save(step + 1)

    Models, wrapped or not, under DDP or FSDP2, are saved by any number of ranks and loaded by any
    other, with the same `fuse_on`: under "step" experts are in the optimizer's state, so name the
    optimizer as a part too. With them go the random numbers, and gradients and bank
    statistics that wait for an optimizer's step. The ranks of torch.distributed call all methods
    together; the folder is one that all of them see.

    Ranks may have different parts, as the stages of a pipeline: a part is one thing on the ranks
    that name it.

        parts = {f"stage-{index}": stage, f"optimizer-{index}": optimizer}

    Args:
        folder: of the run; one process group at a time writes to it.
        parts: what is saved, by names of letters, digits, "_" and "-": models, optimizers, and all
            else with `state_dict` and `load_state_dict`, such as schedulers, GradScalers and
            torchdata's StatefulDataLoader. Make the optimizer after `wrap` and `fully_shard`.
        process_group: the ranks of the run, a process group or device mesh; by default all ranks
            of the job. Of several models in one job, each has a folder and a group of its own.
        keep: how many checkpoints stay; None keeps all.
        asynchronous: copy to the CPU in `save`, and write while the run goes on.

    Raises:
        ValueError: a part or an argument is none of those, or a part holds other tensors on some
            ranks than on others.
        RuntimeError: some ranks do not create theirs.
    """

    def __init__(
        self,
        folder: str | Path,
        parts: Mapping[str, Any],
        *,
        keep: int | None = 3,
        asynchronous: bool = False,
        process_group: Any = None,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be at least 1, or None for all, got {keep}.")
        self._named = dict(parts)
        self._parts = parts_of(parts, Module, OptimizerPart)
        self._run = RunFolder(Path(folder))
        self._keep = keep
        self._processes = Processes.of(process_group)
        self._holders = Holders(self._parts, self._processes)
        self._writer = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._writing: Future[None] | None = None

    def save(self, step: int) -> None:
        """Save all parts as the checkpoint of a step, and remove the oldest ones.

        An asynchronous one returns when all is copied to the CPU; it first waits for the one before
        it. What a process that died has left half-written is removed.

        Args:
            step: how many steps are done.

        Raises:
            CheckpointError: on every rank, if this one, or an asynchronous one before it, could not
                be written, as for a full disk, or a part's state holds what a file cannot. Those
                before it are whole, and the run can go on.
        """
        self.wait()
        captured = self._processes.each(lambda: Captured(self._parts))
        if self._writer is None:
            self._write(step, captured)
        else:
            captured.copy_to_cpu()
            self._writing = self._writer.submit(self._write, step, captured)

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            CheckpointError: it could not be.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def resume(self, *, leave_out: Collection[str] = (), resize_experts: bool = False) -> int:
        """Continue from the latest checkpoint that is whole.

        Every file is compared with its checksum first. A damaged checkpoint is passed over with a
        warning for the one before it.

        Args:
            leave_out: names of parts that stay as they are; "random_numbers" is one.
            resize_experts: take a checkpoint with another number of experts. More are copies of the
                dense weight, fewer are fused side by side; fused weights stay as they are, to
                rounding. Optimizers keep averages of their states.

        Returns:
            How many steps are done: what was given to `save`, or 0 where there is no checkpoint.

        Raises:
            CheckpointError: on every rank, if all checkpoints are damaged, or the latest whole one
                does not fit the parts. They are then as they were.
        """
        self.wait()
        names = set(self._holders.ranks)
        if unknown := set(leave_out) - names:
            raise ValueError(f"leave_out names {sorted(unknown)}; the parts are {sorted(names)}.")
        latest = self._latest_whole()
        if latest is None:
            return 0
        step, manifest = latest
        kinds = (ResizedModule, ResizedOptimizer) if resize_experts else (Module, OptimizerPart)
        parts = [p for p in parts_of(self._named, *kinds) if p.name not in leave_out]
        self._load(self._run.of(step), manifest, parts)
        return step

    def _latest_whole(self) -> tuple[int, dict[str, Any]] | None:
        """The step and the manifest of the latest checkpoint that is whole, if there is any."""
        self._processes.on_first(self._run.tidy)
        damages = []
        for step in self._processes.on_first(self._run.in_order):
            try:
                return step, read_manifest(self._run.of(step), self._processes)
            except CheckpointError as error:
                damages.append(str(error))
                warnings.warn(f"Passed over a checkpoint: {error}", stacklevel=3)
        if damages:
            raise CheckpointError(
                f"All {len(damages)} checkpoints in {self._run.path} are damaged; the latest: "
                f"{damages[0]} Remove them to start from the beginning."
            )
        return None

    def _write(self, step: int, captured: Captured) -> None:
        is_first = self._processes.rank == 0
        try:
            self._write_files(step, captured)
        except Exception as error:
            if is_first:
                shutil.rmtree(self._run.partial(step), ignore_errors=True)
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(
                f"The checkpoint of step {step} could not be written to {self._run.path}: "
                f"{reason[-1]}"
            ) from error
        if self._keep is not None and is_first:
            self._run.keep(self._keep)

    def _write_files(self, step: int, captured: Captured) -> None:
        folder, ranks = self._run.partial(step), self._processes
        ranks.on_first(lambda: self._run.start(step))
        ranks.each(
            lambda: for_each(
                self._holders.processes,
                lambda name, those: write_tensors(
                    folder / name, captured.tensors[name], those.group
                ),
            )
        )
        own = captured.rank_values, captured.rank_tensors
        ranks.each(lambda: write_rank(folder, ranks.rank, *own))
        firsts = [name for name, those in self._holders.processes.items() if those.rank == 0]
        ranks.each(lambda: captured.describe(folder, firsts))
        content = {
            "step": step,
            "ranks": ranks.count,
            "parts": list(self._holders.ranks),
            "holders": self._holders.described(),
            "torch": str(torch.__version__),
        }
        write_manifest(folder, content, ranks)
        ranks.on_first(lambda: self._run.commit(step))

    def _load(self, folder: Path, manifest: Mapping[str, Any], parts: list[Part]) -> None:
        ranks = self._processes
        plans = ranks.each(lambda: self._checked_plans(folder, manifest, parts))
        ranks.each(
            lambda: for_each(
                {name: plans[name] for name in self._holders.processes if name in plans},
                lambda name, plan: read_tensors(
                    folder / name, plan.tensors, self._holders.processes[name].group
                ),
            )
        )
        ranks.each(lambda: load_all(plans.values()))

    def _checked_plans(
        self, folder: Path, manifest: Mapping[str, Any], parts: list[Part]
    ) -> dict[str, Plan]:
        if missing := [part.name for part in parts if part.name not in manifest["parts"]]:
            raise CheckpointError(
                f"{folder} lacks {missing[0]!r}; it holds {manifest['parts']}. Resume without it: "
                f"resume(leave_out={missing})."
            )
        read = functools.cache(lambda rank: read_rank(folder, rank))
        try:
            return {part.name: self._plan(folder, manifest, part, read) for part in parts}
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder} does not hold what a run saves: {error!r}") from error

    def _plan(self, folder: Path, manifest: Mapping[str, Any], part: Part, read: Read) -> Plan:
        those, saved = self._holders.processes[part.name], saved_by(part.name, manifest)
        is_same = len(saved) == those.count
        numbers = [saved[those.rank]] if is_same else saved
        of_part = [read(number)[part.name] for number in numbers]
        values = of_part[0] if is_same else part.merged(of_part, those.rank)
        return Plan(part, part.allocate(stored_tensors(folder / part.name), values), values)
