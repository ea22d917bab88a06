"""Results that are on disk as soon as they are measured, and the time that a line has."""

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


class Results:
    """Rows by their keys, in a JSON file that a later run of the same line adds to.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = json.loads(path.read_text()) if path.exists() else {}

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def add(self, key: str, row: Row) -> None:
        """Write a row down, before anything else is measured."""
        self.rows[key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.with_suffix(".part")
        whole.write_text(json.dumps(self.rows, indent=1) + "\n")
        os.replace(whole, self.path)


@dataclasses.dataclass
class Line:
    """What a line of the script gets.

    Args:
        results: of this line.
        seconds: its share of the time.
        device: where it measures.
        data: the folder of Fashion-MNIST's IDX files.
        is_dry: everything at toy size.
    """

    results: Results
    seconds: float
    device: str
    data: Path
    is_dry: bool = False
    started: float = dataclasses.field(default_factory=time.time)
    last: float = 0.0

    @property
    def until(self) -> float:
        """When its share is over, as `time.time()` has it."""
        return self.started + self.seconds

    def has_time(self, needed: float = 0.0) -> bool:
        """Whether the share has as many seconds left, and as the last case took.

        The first one compiles, so the longest would say little of those that follow.
        """
        return time.time() + max(needed, self.last) < self.until

    def measured(self, started: float) -> None:
        """A case that began then has ended."""
        self.last = time.time() - started

    @contextmanager
    def case(self, what: str) -> Iterator[None]:
        """One of several cases: its time is counted, and its failure leaves the others theirs."""
        started = time.time()
        try:
            yield
        except Exception as error:
            if self.is_dry:
                raise
            first = (str(error).splitlines() or [""])[0]
            say(f"{what}: failed, and the others go on: {type(error).__name__}: {first}")
        self.measured(started)

    def can_compile(self) -> bool:
        """Whether torch.compile works here; on a GPU it needs Triton and a C compiler."""
        compiled = []
        with self.case("torch.compile, so nothing is compiled"):
            compiled.append(torch.compile(lambda x: x.sin() + 1)(torch.ones(4, device=self.device)))
        return bool(compiled)


def markdown(rows: Sequence[Row]) -> str:
    """A table; a column that only some rows have is empty in the others."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names)]
    lines += [["" if row.get(name) is None else str(row[name]) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def say(text: str) -> None:
    """A line that is seen at once."""
    print(text, flush=True)
