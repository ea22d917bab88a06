"""One run of a study, and its record: a file with one JSON line, which appears when it has ended.

A run that has a record is not done again, so a study that was killed continues. What the results
depend on besides is remembered by the study's folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..atomic_files import write_file

Numbers = float | Mapping[str, float]
"""The result of a run: the metric, or several numbers, one of them called "metric"."""


class Run(NamedTuple):
    """One run of a study: what it trains, and how.

    Attributes:
        arm: what is trained.
        seed: of everything that is random.
        lr: learning rate; None where there is no grid.
        length: of the training, as a share of the usual length.
        tuning: whether it only chooses a learning rate.

    Example:
        >>> str(Run("mb", seed=1, lr=1e-3))
        'mb, seed 1, lr 0.001'
    """

    arm: str
    seed: int
    lr: float | None = None
    length: float = 1.0
    tuning: bool = False

    def __str__(self) -> str:
        lr = "" if self.lr is None else f", lr {self.lr:g}"
        length = "" if self.length == 1 else f", length {self.length:g}"
        return f"{self.arm}, seed {self.seed}{lr}{length}{', tuning' if self.tuning else ''}"

    @property
    def name(self) -> str:
        """Of its files."""
        words = re.sub(r"[^\w.]+", "-", str(self)).strip("-")[:80]
        return f"{words}-{hashlib.sha256(repr(tuple(self)).encode()).hexdigest()[:8]}"


class Result(NamedTuple):
    """The numbers that a run has measured.

    Args:
        run: what was run.
        metric: what is compared.
        seconds: of the training.
        more: any other numbers.
    """

    run: Run
    metric: float
    seconds: float
    more: dict[str, float]


Trial = Callable[[Run], Numbers]
"""Does one run."""


def record_of(run: Run, folder: Path) -> Path:
    """The file of a run that has ended."""
    return folder / f"{run.name}.json"


def read(run: Run, folder: Path) -> Result:
    """The result of a run that has ended."""
    found = json.loads(record_of(run, folder).read_text())
    more = {
        key: value for key, value in found.items() if key not in (*run._fields, *Result._fields)
    }
    return Result(run, found["metric"], found["seconds"], more)


def error_of(run: Run, folder: Path) -> Path:
    """The file that says why a run failed."""
    return folder / f"{run.name}.error.txt"


def attempt(trial: Trial, run: Run, folder: Path) -> str:
    """Do a run and record it; what went wrong, if anything did."""
    start, error_file = time.perf_counter(), error_of(run, folder)
    try:
        numbers = as_numbers(trial(run))
    except Exception as error:  # whatever the user's code raises: other runs go on
        error_file.write_text(traceback.format_exc())
        return f"{type(error).__name__}: {error}".splitlines()[0]
    seconds = {"seconds": time.perf_counter() - start}
    line = json.dumps(run._asdict() | seconds | numbers) + "\n"
    write_file(record_of(run, folder), line.encode())
    error_file.unlink(missing_ok=True)
    return ""


def as_numbers(found: Numbers) -> dict[str, float]:
    """Convert the value that a run has returned to floats by their names.

    Raises:
        TypeError: it is not a number, nor a mapping of numbers with a metric.
    """
    named = dict(found) if isinstance(found, Mapping) else {"metric": found}
    try:
        numbers = {name: _as_float(value) for name, value in named.items()}
    except (TypeError, ValueError, RuntimeError):
        numbers = {}
    if "metric" not in numbers:
        raise TypeError(
            "A run returns its metric, as a number or as a dict of numbers with the key "
            f'"metric", got {found!r}. Return float(accuracy), for example.'
        )
    return numbers


def _as_float(value: float | torch.Tensor) -> float:
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


def remembered(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write down the settings of a new study; those that it was begun with, as JSON has them."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(settings, indent=1).encode())
    return json.loads(path.read_text())


def require_same(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise a ValueError if a folder holds a study with other settings."""
    before = remembered(folder / "settings.json", settings)
    now: dict[str, Any] = json.loads(json.dumps(settings))
    keys = sorted(before.keys() | now.keys())
    if changed := [key for key in keys if before.get(key) != now.get(key)]:
        raise ValueError(
            f"{folder} holds a study with other settings ({', '.join(changed)} differ). "
            "Take another folder for out."
        )
