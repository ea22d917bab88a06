"""Ctrl-C during an optimizer's step takes effect after it, so that no step is left half done."""

from __future__ import annotations

import signal
import sys
import threading
from types import CodeType, FrameType
from typing import Any

from torch.optim import Optimizer


def _step_code() -> CodeType:
    """The code of what torch puts around every optimizer's `step`, which calls the hooks."""
    hooked: Any = Optimizer.profile_hook_step(_step_code)
    code: CodeType = hooked.__code__
    return code


def _steps_on_stack(frame: FrameType | None = None) -> int:
    frame = sys._getframe() if frame is None else frame
    code, count = _step_code(), 0
    while frame is not None:
        count += frame.f_code is code
        frame = frame.f_back
    return count


class DeferredInterrupt:
    """Holds back SIGINT from `begin` to `end`, or until the optimizer's step has failed."""

    def __init__(self) -> None:
        self._before: Any = None
        self._received = False

    def begin(self) -> None:
        """Hold SIGINT back from now on."""
        if threading.current_thread() is not threading.main_thread():
            return
        before = signal.getsignal(signal.SIGINT)
        active = getattr(before, "__self__", None)
        if isinstance(active, DeferredInterrupt):
            if _steps_on_stack() > 1:  # a step within another's closure
                return
            active.end()  # its step has failed, and its post-hooks were not called
            before = signal.getsignal(signal.SIGINT)
        if callable(before):
            self._before, self._received = before, False
            signal.signal(signal.SIGINT, self._receive)

    def end(self) -> None:
        """Let SIGINT through again, and the one that was held back."""
        if self._before is None:
            return
        before, self._before = self._before, None
        if signal.getsignal(signal.SIGINT) == self._receive:  # no one else's since
            signal.signal(signal.SIGINT, before)
        if self._received:
            before(signal.SIGINT, None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        if _steps_on_stack(frame) == 0:
            self.end()  # the step has failed, and its post-hooks were not called
