"""Stops a run after the current step, on Ctrl-C or when the cluster preempts the job."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from ..files.processes import Processes


class StopRequest:
    """Notes SIGTERM and SIGINT, for the loop to save a checkpoint and end.

        stop = StopRequest()
        for batch in batches:
            ...
            if stop.received():
                checkpoints.save(step)
                break

    A second signal stops at once.

    Args:
        signals: those to note. Only the main thread can take signals.
        process_group: the ranks that stop together, as for `Checkpoints`; by default all of the
            job.
    """

    def __init__(
        self,
        signals: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT),
        *,
        process_group: Any = None,
    ) -> None:
        self._processes = Processes.of(process_group)
        self._is_received = False
        for number in signals:
            signal.signal(number, self._receive)

    def received(self) -> bool:
        """Whether any rank was asked to stop: the same answer on all of them, at the same step.

        All ranks have to call it at the same steps, as they talk to each other.
        """
        return self._processes.any(self._is_received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._is_received = True
        signal.signal(number, signal.SIG_DFL)
