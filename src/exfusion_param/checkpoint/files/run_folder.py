"""The folder of a run: one folder for each checkpoint, and a file that names the latest one.

    run/step-00000200/   a whole checkpoint
    run/latest           "step-00000200"
    run/step-00000300.partial/   one that is being written, or was when the process died

A checkpoint is written beside the others and renamed when all of it is on disk, so that a folder
with a checkpoint's name is always a whole one.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from ...atomic_files import PARTIAL, sync, write_file

_NAME = re.compile(r"step-(\d{8,18})")
_LATEST = "latest"
REPLACED = ".replaced"


class RunFolder:
    """The checkpoints of a run on disk. One process at a time changes them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def of(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.path / f"step-{step:08d}"

    def partial(self, step: int) -> Path:
        """The folder that a step's checkpoint is written to, before it is renamed."""
        return self.path / f"{self.of(step).name}{PARTIAL}"

    def start(self, step: int) -> None:
        """Make an empty folder to write the checkpoint of a step to."""
        self.tidy()
        self.partial(step).mkdir(parents=True)

    def commit(self, step: int) -> None:
        """Give the written checkpoint its name, and make it the latest."""
        final, aside = self.of(step), self.path / f"{self.of(step).name}{REPLACED}"
        sync(self.partial(step))
        if final.exists():
            os.replace(final, aside)
        os.replace(self.partial(step), final)
        write_file(self.path / _LATEST, final.name.encode())
        shutil.rmtree(aside, ignore_errors=True)

    def tidy(self) -> None:
        """Remove what processes that died have left."""
        for path in self._entries():
            if path.name.endswith(REPLACED):
                original = path.with_name(path.name.removesuffix(REPLACED))
                shutil.rmtree(path) if original.exists() else os.replace(path, original)
            elif path.name.endswith(PARTIAL):
                path.unlink() if path.is_file() else shutil.rmtree(path)

    def keep(self, count: int) -> None:
        """Remove all but some checkpoints: the latest, and those of the steps before it."""
        for step in self.in_order()[count:]:
            if step < self.in_order()[0]:
                shutil.rmtree(self.of(step), ignore_errors=True)

    def in_order(self) -> list[int]:
        """The steps of the checkpoints: the latest first, those before it, then those after it.

        After a run went back to an older checkpoint, those after it are of another course.
        """
        steps = [
            int(match[1])
            for path in self._entries()
            if (match := _NAME.fullmatch(path.name)) and path.is_dir()
        ]
        latest = self._latest(steps)
        return sorted(steps, key=lambda step: (step <= latest, step), reverse=True)

    def _latest(self, steps: list[int]) -> int:
        try:
            named = (self.path / _LATEST).read_bytes()[:64].decode(errors="replace").strip()
        except OSError:
            named = ""
        match = _NAME.fullmatch(named)
        step = int(match[1]) if match else -1
        return step if step in steps else max(steps, default=0)

    def _entries(self) -> list[Path]:
        return sorted(self.path.iterdir()) if self.path.is_dir() else []
