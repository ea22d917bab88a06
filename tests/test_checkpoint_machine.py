"""Whatever is done to a run and its folder, it goes on as if nothing had happened."""

import contextlib
import errno
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from exfusion_param.checkpoint import CheckpointError
from exfusion_testing.runs import Run, assert_equal

LENGTH = 8


class Killed(BaseException):
    """The process ends here."""


def undisturbed() -> list[dict[str, torch.Tensor]]:
    """The state after each step of a run that nothing happens to."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), fuse_on="step")
        states = [run.state()]
        for step in range(LENGTH):
            states.append(run.train(step, step + 1).state())
    return states


STATES = undisturbed()


class Machine(RuleBasedStateMachine):
    """A run, its folder, and what may happen to them."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.start()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def start(self, asynchronous: bool = False) -> None:
        """A new process."""
        self.run = Run(self.folder, fuse_on="step", keep=2, asynchronous=asynchronous)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Passed over")
            self.done = self.run.checkpoints.resume()

    @precondition(lambda self: self.done < LENGTH)
    @rule()
    def train(self) -> None:
        self.run.train(self.done, self.done + 1)
        self.done += 1

    @rule()
    def save(self) -> None:
        self.run.checkpoints.save(self.done)
        self.run.checkpoints.wait()

    @rule(asynchronous=st.booleans())
    def die(self, asynchronous: bool) -> None:
        before = self.done
        self.start(asynchronous)
        assert self.done <= before

    @rule(at=st.integers(0, 40))
    def die_in_a_save(self, at: int) -> None:
        """At any of the calls that change the disk."""
        with Interrupted(at, Killed()), contextlib.suppress(Killed, CheckpointError):
            self.run.checkpoints.save(self.done)
            self.run.checkpoints.wait()
        self.start()

    @rule(at=st.integers(0, 40))
    def fill_the_disk(self, at: int) -> None:
        full = OSError(errno.ENOSPC, "No space left on device")
        with contextlib.suppress(CheckpointError), Interrupted(at, full):
            self.run.checkpoints.save(self.done)
            self.run.checkpoints.wait()

    @precondition(lambda self: len(list(self.folder.glob("step-????????"))) > 1)
    @rule(where=st.floats(0, 1, exclude_max=True), deletes=st.booleans())
    def damage_the_latest(self, where: float, deletes: bool) -> None:
        latest = sorted(self.folder.glob("step-????????"))[-1]
        files = sorted(path for path in latest.rglob("*") if path.is_file())
        file = files[int(where * len(files))]
        if deletes:
            file.unlink()
        else:
            content = bytearray(file.read_bytes())
            content[int(where * len(content))] ^= 0x10
            file.write_bytes(content)
        self.start()

    @invariant()
    def goes_on_as_if_nothing_had_happened(self) -> None:
        assert_equal([self.run.state()], STATES[self.done])


class Interrupted:
    """The n-th call that changes the disk raises, and so do all after it."""

    NAMES = ("replace", "fsync", "mkdir")

    def __init__(self, at: int, error: BaseException) -> None:
        self.left, self.error = at, error
        self.originals = {name: getattr(os, name) for name in self.NAMES}

    def __enter__(self) -> None:
        for name, original in self.originals.items():
            setattr(os, name, self._wrapped(original))

    def __exit__(self, *error: Any) -> None:
        for name, original in self.originals.items():
            setattr(os, name, original)

    def _wrapped(self, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise self.error
            return original(*args, **kwargs)

        return call


@pytest.mark.filterwarnings("ignore:Passed over")
class TestMachine(Machine.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(max_examples=20, stateful_step_count=15, deadline=None)
