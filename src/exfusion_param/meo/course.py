"""Tells the forwards of a model apart, also where its parts are called without it.

A gate keeps what it has chosen in training until the next forward of the model begins, for
`balance_loss` and `metrics`. Code that calls `forward_features` or single blocks never calls the
model itself, and what is kept holds graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn


class Recorder(Protocol):
    """A gate."""

    def forget(self) -> None:
        """Give up what is kept."""


class Course:
    """The forwards of the model that `meo.wrap` was called on.

    Args:
        gates: the model's new gates.
    """

    def __init__(self, gates: Sequence[Recorder]) -> None:
        self.gates = gates
        self._is_called = False  # the model itself, which may use a gate several times
        self._first: Recorder | None = None  # to record since the forward began
        self._have_others = len(gates) == 1

    def begin(self, model: nn.Module, args: Any) -> None:
        """A pre-hook of the model."""
        self._is_called = not torch.compiler.is_compiling()
        self._restart()

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """A hook of the model."""
        if not torch.compiler.is_compiling():
            self._is_called = False

    def record(self, gate: Recorder) -> None:
        """A gate is about to record; where the first one does again, another forward begins."""
        if self._is_called or torch.compiler.is_compiling():
            return
        if gate is self._first and self._have_others:
            self._restart()
        if self._first is None:
            self._first = gate
        elif gate is not self._first:
            self._have_others = True

    def _restart(self) -> None:
        self._first, self._have_others = None, len(self.gates) == 1
        for gate in self.gates:
            gate.forget()
