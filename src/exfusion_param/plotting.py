"""Plots of a run's history; needs matplotlib.

A history maps the name of a column to its values over the run, as a CSV file of `metrics(model)`
reads: `{"step": [...], "fusion_weights/blocks.0.mlp/0": [...], ...}`. Every function draws on the
given axes, or on new ones, and returns them.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

History = Mapping[str, Sequence[float]]


def read_history(path: str | Path) -> dict[str, list[float]]:
    """The columns of a CSV file of numbers with a header; an empty cell reads as nan."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = rows[0] if rows else ()
    return {name: [float(row[name] or "nan") for row in rows] for name in columns}


def curves(
    histories: Mapping[str, History], column: str, *, x: str = "step", ax: Axes | None = None
) -> Axes:
    """One column of several runs over the course of training.

    Args:
        histories: each run's history by its label.
        column: the column to draw; rows without a value are left out.
        x: the column of the horizontal axis.
        ax: axes to draw on; None makes new ones.

    Returns:
        The axes.

    Raises:
        ValueError: a history lacks one of the columns.
    """
    ax = ax or plt.figure(layout="constrained").subplots()
    for label, history in histories.items():
        for name in (x, column):
            if name not in history:
                raise ValueError(f"{label!r} has no column {name!r}. It has {', '.join(history)}.")
        points = [(at, y) for at, y in zip(history[x], history[column], strict=True) if y == y]
        ax.plot(*np.array(points).reshape(-1, 2).T, label=label)
    ax.set(xlabel=x, ylabel=column)
    ax.legend()
    return ax


def fusion_weights(
    history: History, group: str, *, x: str = "step", ax: Axes | None = None
) -> Axes:
    """Fusion weights of one FFN group over the course of training (the paper's Figure 5).

    Args:
        history: holds the columns `fusion_weights/{group}/{i}` of `metrics`.
        group: name of the FFN group.
        x: the column of the horizontal axis.
        ax: axes to draw on; None makes new ones.

    Returns:
        The axes.

    Raises:
        ValueError: the history has no such group.
    """
    prefix = f"fusion_weights/{group}/"
    columns = [name for name in history if name.startswith(prefix)]
    if not columns:
        groups = ", ".join(group_names(history)) or "none"
        raise ValueError(f"The history has no FFN group {group!r}. Its groups are: {groups}.")
    ax = ax or plt.figure(layout="constrained").subplots()
    for column in columns:
        ax.plot(history[x], history[column], label=f"expert {column.removeprefix(prefix)}")
    ax.set(xlabel=x, ylabel="fusion weight", title=group)
    ax.legend()
    return ax


def group_names(history: History) -> list[str]:
    """The FFN groups whose fusion weights a history holds, in its order."""
    names = [name.split("/", 1)[1] for name in history if name.startswith("fusion_weights/")]
    return list(dict.fromkeys(name.rpartition("/")[0] for name in names))
