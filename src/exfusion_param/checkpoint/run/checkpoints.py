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
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..files.errors import CheckpointError
from ..files.manifest import read_manifest, write_manifest
from ..files.processes import Processes
from ..files.run_folder import RunFolder
from .holders import Holders
from .snapshot import Captured, Stored, parts_of


class Checkpoints:
    """Saves a run, and resumes it bit for bit.

        checkpoints = Checkpoints("run", {"model": model, "optimizer": optimizer})
        for step in range(checkpoints.resume(), steps):
            ...
            if (step + 1) % 100 == 0:
                checkpoints.save(step + 1)

    Models, wrapped or not, under DDP or FSDP2, can be saved and loaded on different numbers of
    ranks, but need the same `fuse_on`. Under "step" the experts are in the optimizer's state, so
    include the optimizer in `parts`. The state of the random number generators, and the gradients
    and bank statistics of an unfinished accumulation are saved automatically. All ranks must call
    every method, and see the same folder.

    Ranks may have different parts, such as the stages of a pipeline, as long as a name means the
    same part on all ranks that use it.

        parts = {f"stage-{index}": stage, f"optimizer-{index}": optimizer}

    Args:
        folder: the folder of the run; only one process group may write to it at a time.
        parts: the objects to save: models, optimizers, and anything else with `state_dict` and
            `load_state_dict`, such as schedulers, GradScalers and torchdata's StatefulDataLoader.
            Names consist of letters, digits, "_" and "-". Create the optimizer after `wrap` and
            `fully_shard`.
        process_group: the ranks of the run, as a process group or device mesh; by default all ranks
            of the job. If a job trains several models, give each its own folder and group.
        keep: the number of checkpoints to keep; None keeps all.
        asynchronous: copy the state to the CPU in `save`, and write it while training continues.

    Raises:
        ValueError: a part or an argument is invalid, or a part holds different tensors on
            different ranks.
        RuntimeError: some ranks did not create their `Checkpoints`.
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
        self._parts = parts_of(parts)
        self._run = RunFolder(Path(folder))
        self._keep = keep
        self._processes = Processes.of(process_group)
        self._holders = Holders(self._parts, self._processes)
        self._writer = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._writing: Future[None] | None = None

    def save(self, step: int) -> None:
        """Save all parts as the checkpoint of a step, and remove the oldest ones.

        An asynchronous save waits for the previous one, and returns when everything is copied to
        the CPU. Incomplete files of processes that died are removed.

        Args:
            step: the number of completed steps.

        Raises:
            CheckpointError: on every rank, if this checkpoint or an earlier asynchronous one could
                not be written, for example because the disk is full, or the state of a part cannot
                be stored. Earlier checkpoints are intact, and training can continue.
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
            CheckpointError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def resume(self, *, leave_out: Collection[str] = (), resize_experts: bool = False) -> int:
        """Load the latest intact checkpoint.

        Every file is verified by its checksum first. If a checkpoint is damaged, a warning is given
        and the previous one is loaded.

        Args:
            leave_out: names of parts that are not loaded; may include "random_numbers".
            resize_experts: accept a checkpoint with a different number of experts. Additional
                experts are copies of the dense weight; if there are fewer, neighbors are merged.
                The fused weights stay the same up to rounding, and optimizer states are averaged.

        Returns:
            The number of completed steps, as given to `save`; 0 if there is no checkpoint.

        Raises:
            CheckpointError: on every rank, if all checkpoints are damaged, or the latest intact one
                does not fit the parts. The parts are then unchanged.
        """
        self.wait()
        names = set(self._holders.ranks)
        if unknown := set(leave_out) - names:
            raise ValueError(f"leave_out names {sorted(unknown)}; the parts are {sorted(names)}.")
        latest = self._latest_whole()
        if latest is None:
            return 0
        step, manifest = latest
        parts = parts_of(self._named, resize_experts=resize_experts)
        parts = [part for part in parts if part.name not in leave_out]
        stored = self._processes.each(
            lambda: Stored(self._run.of(step), manifest, parts, self._holders)
        )
        self._holders.each(stored.read)
        self._processes.each(stored.load)
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
        self._holders.each(functools.partial(captured.write, folder))
        ranks.each(lambda: captured.write_rank(folder, ranks.rank))
        content = {
            "step": step,
            "ranks": ranks.count,
            "parts": list(self._holders.ranks),
            "holders": self._holders.described(),
            "torch": str(torch.__version__),
        }
        write_manifest(folder, content, ranks)
        ranks.on_first(lambda: self._run.commit(step))
