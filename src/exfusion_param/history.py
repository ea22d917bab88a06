"""A run's history as a CSV file: one row for each time that numbers were logged."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

History = Mapping[str, Sequence[float]]
"""The values of each column over the run, as in `{"step": [50, 100], "loss": [2.1, 1.9]}`."""


def read_history(path: str | Path) -> dict[str, list[float]]:
    """The columns of a CSV file of numbers with a header; an empty cell reads as nan.

    Raises:
        ValueError: a cell holds no number.
    """
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = rows[0] if rows else ()
    return {name: [_number(path, name, row[name]) for row in rows] for name in columns}


def write_history(path: str | Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write rows as a CSV file; a row may lack columns that others have."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


def append_row(path: str | Path, row: Mapping[str, float]) -> None:
    """Add a row to a CSV file, which is made if there is none; new columns may come at any time.

    Args:
        path: the file.
        row: its numbers, such as `{"step": 50, "loss": 2.1} | metrics(model)`.
    """
    if not Path(path).exists():
        write_history(path, [row])
        return
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or ())
        if not set(row) <= set(columns):
            write_history(path, [*reader, row])  # type: ignore[list-item]
            return
    with open(path, "a", newline="") as file:
        csv.DictWriter(file, columns).writerow(row)


def drop_rows_after(path: str | Path, step: float) -> None:
    """Drop the rows of later steps, which a resumed run is about to write anew."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    kept = [row for row in rows if float(row["step"]) <= step]
    if kept:
        write_history(path, kept)  # type: ignore[arg-type]
    else:
        os.remove(path)


def _number(path: str | Path, column: str, text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        raise ValueError(f"{path}: the column {column!r} holds {text!r}, not a number.") from None
