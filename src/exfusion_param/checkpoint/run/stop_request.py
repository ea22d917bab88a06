"""Stops a run after the current step, on Ctrl-C or when the cluster preempts the job."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from ..files.processes import Processes


class StopRequest:
    """Records SIGTERM and SIGINT, so that the loop can save a checkpoint and stop.

        stop = StopRequest()
        for batch in batches:
            ...
            if stop.received():
                checkpoints.save(step)
                break

    A second signal stops the process at once.

    Args:
        signals: the signals to record. Create the object in the main thread.
        process_group: the ranks that stop together, as for `Checkpoints`; by default all ranks
            of the job.
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
        """Return whether any rank was asked to stop; all ranks get the same answer.

        All ranks must call it at the same steps, because they communicate.
        """
        return self._processes.any(self._is_received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._is_received = True
        signal.signal(number, signal.SIG_DFL)
