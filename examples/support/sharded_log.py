"""The log of a run on several ranks."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from support import ranks
from support.log import RunLog

Item = TypeVar("Item")


class SharedLog:
    """`RunLog` and a progress bar on the first rank; the others call it alike.

    Args:
        folder: of the files.
        batch_size: images of a step, on all ranks together.
        done: the step that the run continues after.
        steps: of the whole run.
    """

    def __init__(self, folder: Path, batch_size: int, done: int, steps: int) -> None:
        self.log = RunLog(folder, after=done) if ranks.is_first() else None
        self.steps = range(done, steps)
        self.batch_size, self.last, self.time = batch_size, done, time.perf_counter()
        self.bar: Any = None

    def progress(self, batches: Iterable[Item]) -> Iterable[Item]:
        """The same batches, one for each step that is left, with a progress bar."""
        done, total = self.steps.start, self.steps.stop
        self.bar = tqdm(batches, initial=done, total=total, disable=self.log is None)
        return self.bar

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of one step, and the images per second since the last row."""
        now = time.perf_counter()
        speed = self.batch_size * (step - self.last) / (now - self.time)
        self.last, self.time = step, now
        self.bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed:.0f} images/s")
        if self.log:
            self.log.row(step, {"images_per_second": speed, **values})

    def close(self) -> None:
        """Write out what waits."""
        if self.log:
            self.log.close()
