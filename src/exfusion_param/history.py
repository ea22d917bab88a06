"""A run's history as a CSV file: one row for each time that numbers were logged."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .atomic_files import write_file

History = Mapping[str, Sequence[float]]
"""The values of each column over the run, as in `{"step": [50, 100], "loss": [2.1, 1.9]}`."""


def read_history(path: str | Path) -> dict[str, list[float]]:
    """Read the columns of a CSV file of numbers with a header; an empty cell becomes nan.

    Raises:
        ValueError: a cell does not contain a number.

    Examples:
        >>> write_history("metrics.csv", [{"step": 1, "loss": 2.5}, {"step": 2, "accuracy": 0.5}])
        >>> read_history("metrics.csv")
        {'step': [1.0, 2.0], 'loss': [2.5, nan], 'accuracy': [nan, 0.5]}
    """
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = rows[0] if rows else ()
    return {name: [_number(path, name, row[name]) for row in rows] for name in columns}


def write_history(path: str | Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write rows to a CSV file. Rows may have different columns.

    Examples:
        >>> write_history("metrics.csv", [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5}])
        >>> read_history("metrics.csv")["loss"]
        [2.5, 1.5]
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_file(Path(path), text.getvalue().encode())


def append_row(path: str | Path, row: Mapping[str, float]) -> None:
    """Append a row to a CSV file, creating the file if needed. Rows may add new columns.

    An incomplete last line, left by a killed process, is dropped.

    Args:
        path: the file.
        row: numbers by column, such as `{"step": 50, "loss": 2.1} | metrics(model)`.

    Examples:
        >>> for step in (1, 2):
        ...     append_row("metrics.csv", {"step": step, "loss": 1 / step})
        >>> append_row("metrics.csv", {"step": 2, "accuracy": 0.5})
        >>> read_history("metrics.csv")["loss"]
        [1.0, 0.5, nan]
    """
    rows = _read_lines(Path(path))[1] if Path(path).exists() else []
    write_history(path, [*rows, row])


def drop_rows_after(path: str | Path, step: float) -> None:
    """Drop the rows after a step, which a resumed run will write again.

    Raises:
        ValueError: the file has no column `step`, or one of its cells does not contain a number.

    Examples:
        >>> write_history("metrics.csv", [{"step": step} for step in (1, 2, 3)])
        >>> drop_rows_after("metrics.csv", step=2)
        >>> read_history("metrics.csv")
        {'step': [1.0, 2.0]}
    """
    columns, rows = _read_lines(Path(path))
    if "step" not in columns:
        raise ValueError(f"{path} has no column 'step'. Move it, for the run to write its own.")
    kept = [row for row in rows if not _number(path, "step", row["step"]) > step]
    if kept:
        write_history(path, kept)
    else:
        os.remove(path)


def set_aside(path: str | Path) -> None:
    """Rename the file of an earlier run by adding a number, so that a new run starts its own.

    Examples:
        >>> write_history("metrics.csv", [{"step": 1}])
        >>> set_aside("metrics.csv")
        >>> read_history("metrics.1.csv")
        {'step': [1.0]}
    """
    path = Path(path)
    number = 1
    while (other := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(other)


def _read_lines(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows as text, without a last line that has no end."""
    text = path.read_bytes().decode()
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    return list(reader.fieldnames or ()), list(reader)


def _number(path: str | Path, column: str, text: Any) -> float:
    try:
        return float(text or "nan")
    except (ValueError, TypeError):
        raise ValueError(f"{path}: the column {column!r} holds {text!r}, not a number.") from None
