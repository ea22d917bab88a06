"""Plots of a run's history; needs matplotlib.

A history maps the name of a column to its values over the run, as a CSV file of `metrics(model)`
reads: `{"step": [...], "fusion_weights/blocks.0.mlp/0": [...], ...}`. Every function draws on the
given axes, or on new ones, and returns them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .history import History

__all__ = [
    "curves",
    "fusion_weights",
    "group_names",
    "over_groups",
    "router_load",
    "write_plots",
]

OVER_GROUPS = {
    "effective_experts": "effective number of experts",
    "entropy": "entropy of the fusion weights, nats",
    "expert_distance": "distance between experts, relative",
    "bank_mass": "mass of the memory bank",
}
"""What `metrics` measures once for each FFN group, and what its plot's axis is called."""


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
    ax = ax or _new_axes()
    for label, history in histories.items():
        _require(history, x, column, of=repr(label))
        ax.plot(*_measured(history, x, column), label=label)
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
        ValueError: the history has no such group or no column `x`.
    """
    columns = _columns_of(history, "fusion_weights", group)
    _require(history, x)
    ax = ax or _new_axes()
    _weight_lines(history, columns, x, ax)
    ax.set(xlabel=x, ylabel="fusion weight", title=_shown(group))
    ax.legend()
    return ax


def over_groups(history: History, measure: str, *, x: str = "step", ax: Axes | None = None) -> Axes:
    """One measure of all FFN groups over the course of training, from the first to the last.

    Args:
        history: holds the columns `{measure}/{group}` of `metrics`.
        measure: "effective_experts", "entropy", "expert_distance" or "bank_mass".
        x: the column of the horizontal axis.
        ax: axes to draw on; None makes new ones.

    Returns:
        The axes.

    Raises:
        ValueError: the history has no such measure or no column `x`.
    """
    columns = [name for name in history if name.startswith(f"{measure}/")]
    if not columns:
        measures = dict.fromkeys(name.partition("/")[0] for name in history if "/" in name)
        raise ValueError(f"The history has no {measure!r}. It has {_listed(measures)}.")
    _require(history, x)
    ax = ax or _new_axes()
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(columns)))
    for column, color in zip(columns, colors, strict=True):
        ax.plot(*_measured(history, x, column), color=color, label=_shown(column.partition("/")[2]))
    ax.set(xlabel=x, ylabel=OVER_GROUPS.get(measure, measure))
    ax.legend(fontsize="small", ncols=math.ceil(len(columns) / 12))
    return ax


def router_load(history: History, group: str, *, ax: Axes | None = None) -> Axes:
    """The share of each expert for each class or position, when it was last measured.

    Args:
        history: holds the columns `router_load/{group}/{label}/{i}` of `routing.router_load`.
        group: name of the FFN group.
        ax: axes to draw on; None makes new ones.

    Returns:
        The axes.

    Raises:
        ValueError: the history has no such group.
    """
    columns = _columns_of(history, "router_load", group)
    labels = list(dict.fromkeys(name.split("/")[-2] for name in columns))
    last = [_measured(history, name, name)[1][-1:] for name in columns]
    shares = np.array([value[0] if len(value) else np.nan for value in last])
    ax = ax or _new_axes()
    image = ax.imshow(shares.reshape(len(labels), -1), aspect="auto")
    if len(labels) <= 20:  # classes have names that can be read, the many positions number alone
        ax.set_yticks(range(len(labels)), labels)
    ax.set(xlabel="expert", xticks=range(len(columns) // len(labels)), title=_shown(group))
    ax.figure.colorbar(image, ax=ax, label="router's mean share")
    return ax


def write_plots(history: History, folder: Path) -> list[Path]:
    """Draw all that a history holds into PNG files.

    Args:
        history: a run's history, with a column `step`.
        folder: of the files; it exists.

    Returns:
        The files.

    Raises:
        ValueError: the history holds nothing to draw, or no column `step`.
    """
    paths = []
    for measure, draw in (("fusion_weights", _weights_grid), ("router_load", _load_grid)):
        if groups := group_names(history, measure):
            draw(history, groups)
            paths.append(_save(folder / f"{measure}.png"))
    for measure in OVER_GROUPS:
        if any(name.startswith(f"{measure}/") for name in history):
            _move_legend_out(over_groups(history, measure))
            paths.append(_save(folder / f"{measure}.png"))
    if not paths:
        raise ValueError(f"No column of metrics(model) is in the history, but {_listed(history)}.")
    return paths


def group_names(history: History, measure: str = "fusion_weights") -> list[str]:
    """The FFN groups whose fusion weights, or router load, a history holds, in its order."""
    parts = 2 if measure == "router_load" else 1  # label and expert, or expert
    names = [name.split("/", 1)[1] for name in history if name.startswith(f"{measure}/")]
    return list(dict.fromkeys(name.rsplit("/", parts)[0] for name in names))


def _weights_grid(history: History, groups: list[str]) -> None:
    """The fusion weights of all groups, with one legend and the labels of the axes once."""
    _require(history, "step")
    grid = _grid(len(groups), size=(6.5, 2.1), share=True)
    for group, ax in zip(groups, grid, strict=True):
        _weight_lines(history, _columns_of(history, "fusion_weights", group), "step", ax)
        ax.set_title(_shown(group), fontsize="medium")
    for ax in grid[-2:]:  # the last of each column, which need not be in the last row
        ax.tick_params(labelbottom=True)
    grid[0].xaxis.set_major_locator(MaxNLocator(4, integer=True))  # of all, which share their axes
    figure = plt.gcf()
    figure.supxlabel("step", fontsize="medium")
    figure.supylabel("fusion weight", fontsize="medium")
    experts = {line.get_label(): line for ax in grid for line in ax.lines}
    figure.legend(handles=list(experts.values()), loc="outside upper center", ncols=4)


def _weight_lines(history: History, columns: list[str], x: str, ax: Axes) -> None:
    for column in columns:
        ax.plot(*_measured(history, x, column), label=f"expert {column.rpartition('/')[2]}")


def _move_legend_out(ax: Axes) -> None:
    """Put the legend beside the lines, where it takes no more than half of the figure."""
    legend, figure = ax.get_legend(), plt.gcf()
    assert legend is not None
    legend.set_loc("upper left")
    legend.set_bbox_to_anchor((1, 1))
    width = legend.get_window_extent().width / figure.dpi
    figure.set_figwidth(max(figure.get_figwidth(), 2 * width))


def _load_grid(history: History, groups: list[str]) -> None:
    for group, ax in zip(groups, _grid(len(groups), size=(9, 3), share=False), strict=True):
        router_load(history, group, ax=ax)


def _columns_of(history: History, measure: str, group: str) -> list[str]:
    groups = group_names(history, measure)
    if group not in groups:
        raise ValueError(
            f"The history has no FFN group {group!r} with {measure}. It has {_listed(groups)}."
        )
    depth = 2 if measure == "router_load" else 1
    prefix = f"{measure}/{group}"
    return [name for name in history if name.rsplit("/", depth)[0] == prefix]


def _require(history: History, *columns: str, of: str = "The history") -> None:
    for name in columns:
        if name not in history:
            raise ValueError(f"{of} has no column {name!r}. It has {_listed(history)}.")


def _measured(history: History, x: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    at, values = np.array(history[x], dtype=float), np.array(history[column], dtype=float)
    is_measured = ~np.isnan(values)
    return at[is_measured], values[is_measured]


def _shown(name: str) -> str:
    """A name as matplotlib takes it: not empty, no mathematics, no underscore that hides it."""
    return f" {name}".replace("$", r"\$") if name else "(the model)"


def _listed(names: Mapping[str, object] | list[str]) -> str:
    shown = list(names)[:8]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "") if shown else "none"


def _new_axes() -> Axes:
    return plt.figure(layout="constrained").subplots()


def _grid(count: int, size: tuple[float, float], share: bool) -> list[Axes]:
    """Axes in two columns; the size is the width of the figure and the height of a row, inches."""
    rows = math.ceil(count / 2)
    _, grid = plt.subplots(
        rows, min(count, 2), figsize=(size[0], 0.6 + size[1] * rows), squeeze=False, sharex=share,
        sharey=share, layout="constrained",
    )  # fmt: skip
    for ax in grid.flat[count:]:
        ax.remove()
    return list(grid.flat[:count])


def _save(path: Path) -> Path:
    plt.savefig(path, dpi=200)
    plt.close()
    return path
