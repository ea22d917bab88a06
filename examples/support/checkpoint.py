"""Stop a run at any moment and continue it as if it had not stopped."""

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch


class StopRequest:
    """Notes Ctrl-C (or SIGTERM), for the loop to stop after the step it is in."""

    def __init__(self) -> None:
        self.received = False
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal_number, self._receive)

    def _receive(self, signal_number: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(signal_number, signal.SIG_DFL)  # the second one stops at once


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint beside the last one, then put it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path: Path, settings: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """The checkpoint of a run with these settings; None if there is none.

    Raises:
        SystemExit: the checkpoint belongs to a run with other settings.
    """
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    if changed := sorted(key for key in settings if state["settings"].get(key) != settings[key]):
        raise SystemExit(
            f"{path.parent} holds a run with other settings ({', '.join(changed)}). "
            "Take another --out, or remove that folder."
        )
    return state
