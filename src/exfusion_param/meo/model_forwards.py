"""Hooks of a model with gates: they tell its forwards apart, and refuse some.

A gate keeps what it has chosen in training until the next forward of the model begins, for
`balance_loss` and `metrics`. Code that calls `forward_features` or single blocks never calls the
model itself, and what is kept holds graphs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ..fusion_weights.bank_problems import two_threads
from .attention_watch import AttentionWatch


class Recorder(Protocol):
    """A gate."""

    group: str
    recorded: tuple[Any, ...]

    def forget(self) -> None:
        """Give up what is kept."""


class ModelForwards:
    """The forwards of the model that `meo.wrap` was called on."""

    def __init__(self, gates: Sequence[Recorder], watch: AttentionWatch) -> None:
        self.gates = gates
        self.watch = watch
        self._is_called = False  # the model itself, which may use a gate several times
        self._first: Recorder | None = None  # to record since the forward began
        self._thread: int | None = None  # that has recorded last
        self._have_others = len(gates) == 1

    def begin(self, model: nn.Module, args: Any) -> None:
        """A pre-hook of the model."""
        self._is_called = not torch.compiler.is_compiling()
        if self._is_called:
            self.watch.begin()
        self._restart()

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """A hook of the model."""
        if not torch.compiler.is_compiling():
            self._is_called = False
            self.watch.end()

    def record(self, gate: Recorder) -> None:
        """A gate is about to record; where the first one does again, another forward begins.

        Raises:
            RuntimeError: a forward of another thread is not over, or waits for its step.
        """
        if torch.compiler.is_compiling():
            return
        if not self._is_called:
            self._find_beginning(gate)
        self.require_own_thread(gate)
        self._thread = threading.get_ident()

    def require_own_thread(self, gate: Recorder) -> None:
        """Raise if what is recorded is of another thread's forward."""
        is_other = self._thread not in (None, threading.get_ident())
        if is_other and any(each.recorded for each in self.gates):
            raise two_threads(gate.group, "its gates")

    def _find_beginning(self, gate: Recorder) -> None:
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


def kept_off_fast_paths(linears: Iterable[nn.Module]) -> list[Any]:
    """Hooks that do nothing: torch's Transformer layers read weights only where there are none."""
    return [linear.register_forward_pre_hook(_do_nothing) for linear in linears]


def _do_nothing(linear: nn.Module, args: Any) -> None:
    pass


def refuse_cache(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Raise where a forward continues a sequence whose segments are not known."""
    cache = kwargs.get("past_key_values")
    length = getattr(cache, "get_seq_length", lambda: 0)()
    if length:
        raise RuntimeError(
            "A causal model under meo.wrap gates each segment by the one before, which a cache of "
            "keys and values does not hold. Call generate(..., use_cache=False)."
        )
