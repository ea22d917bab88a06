"""The figures, each on one pair of axes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from ..history import History
from .columns import columns_of, listed, measured, require, shown

OVER_GROUPS = {
    "effective_experts": "effective number of experts",
    "entropy": "entropy of the fusion weights, nats",
    "expert_distance": "distance between experts, relative",
    "bank_mass": "mass of the memory bank",
}
"""The values that `metrics` measures per FFN group, and the labels of their axes."""


def curves(
    histories: Mapping[str, History], column: str, *, x: str = "step", ax: Axes | None = None
) -> Axes:
    """One column of several runs over the course of training.

    Args:
        histories: each run's history by its label.
        column: the column to draw; rows without a value are left out.
        x: the column of the horizontal axis.
        ax: axes to draw on; None makes new ones.

    Raises:
        ValueError: a history lacks one of the columns.

    Examples:
        >>> dense = {"step": [1, 2], "loss": [2.0, 1.0]}
        >>> experts = {"step": [1, 2], "loss": [2.0, 0.5]}
        >>> ax = curves({"dense": dense, "ExFusion": experts}, "loss")
        >>> [line.get_label() for line in ax.lines]
        ['dense', 'ExFusion']
    """
    ax = ax or _new_axes()
    for label, history in histories.items():
        require(history, x, column, of=repr(label))
        ax.plot(*measured(history, x, column), label=label)
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

    Raises:
        ValueError: the history has no such group or no column `x`.

    Examples:
        >>> history = {"step": [1, 2], "fusion_weights/0/0": [0.5, 0.4]}
        >>> history["fusion_weights/0/1"] = [0.5, 0.6]
        >>> ax = fusion_weights(history, "0")
        >>> [line.get_label() for line in ax.lines]
        ['expert 0', 'expert 1']
    """
    columns = columns_of(history, "fusion_weights", group)
    require(history, x)
    ax = ax or _new_axes()
    weight_lines(history, columns, x, ax)
    ax.set(xlabel=x, ylabel="fusion weight", title=shown(group))
    ax.legend()
    return ax


def over_groups(history: History, measure: str, *, x: str = "step", ax: Axes | None = None) -> Axes:
    """One measure of all FFN groups over the course of training, from the first to the last.

    Args:
        history: holds the columns `{measure}/{group}` of `metrics`.
        measure: "effective_experts", "entropy", "expert_distance" or "bank_mass".
        x: the column of the horizontal axis.
        ax: axes to draw on; None makes new ones.

    Raises:
        ValueError: the history has no such measure or no column `x`.

    Examples:
        >>> history = {"step": [1, 2], "entropy/0": [0.7, 0.6], "entropy/1": [0.7, 0.5]}
        >>> ax = over_groups(history, "entropy")
        >>> ax.get_ylabel(), len(ax.lines)
        ('entropy of the fusion weights, nats', 2)
    """
    columns = [name for name in history if name.startswith(f"{measure}/")]
    if not columns:
        measures = dict.fromkeys(name.partition("/")[0] for name in history if "/" in name)
        raise ValueError(f"The history has no {measure!r}. It has {listed(measures)}.")
    require(history, x)
    ax = ax or _new_axes()
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(columns)))
    for column, color in zip(columns, colors, strict=True):
        ax.plot(*measured(history, x, column), color=color, label=shown(column.partition("/")[2]))
    ax.set(xlabel=x, ylabel=OVER_GROUPS.get(measure, measure))
    ax.legend(fontsize="small", ncols=math.ceil(len(columns) / 12))
    return ax


def router_load(history: History, group: str, *, ax: Axes | None = None) -> Axes:
    """The share of each expert for each class or position, when it was last measured.

    Args:
        history: holds the columns `router_load/{group}/{label}/{i}` of `routing.router_load`.
        group: name of the FFN group.
        ax: axes to draw on; None makes new ones.

    Raises:
        ValueError: the history has no such group.

    Examples:
        >>> history = {"router_load/0/cat/0": [0.25], "router_load/0/cat/1": [0.75]}
        >>> ax = router_load(history, "0")
        >>> ax.get_xlabel()
        'expert'
    """
    columns = columns_of(history, "router_load", group)
    labels = list(dict.fromkeys(name.split("/")[-2] for name in columns))
    last = [measured(history, name, name)[1][-1:] for name in columns]
    shares = np.array([value[0] if len(value) else np.nan for value in last])
    ax = ax or _new_axes()
    image = ax.imshow(shares.reshape(len(labels), -1), aspect="auto")
    if len(labels) <= 20:  # classes have names that can be read, the many positions only numbers
        ax.set_yticks(range(len(labels)), labels)
    ax.set(xlabel="expert", xticks=range(len(columns) // len(labels)), title=shown(group))
    ax.figure.colorbar(image, ax=ax, label="router's mean share")
    return ax


def weight_lines(history: History, columns: list[str], x: str, ax: Axes) -> None:
    """A line for each expert."""
    for column in columns:
        ax.plot(*measured(history, x, column), label=f"expert {column.rpartition('/')[2]}")


def _new_axes() -> Axes:
    return plt.figure(layout="constrained").subplots()
