"""All plots of one run, as files."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..history import History
from .axes import OVER_GROUPS, over_groups, router_load, weight_lines
from .columns import columns_of, group_names, listed, require, shown


def write_plots(history: History, folder: Path) -> list[Path]:
    """Draw all that a history holds into PNG files.

    Args:
        history: a run's history, with a column `step`.
        folder: of the files; it exists.

    Returns:
        The files.

    Raises:
        ValueError: the history holds nothing to draw, or no column `step`.

    Examples:
        >>> history = {"step": [1, 2], "entropy/0": [0.7, 0.6], "entropy/1": [0.7, 0.5]}
        >>> [path.name for path in write_plots(history, Path())]
        ['entropy.png']
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
        raise ValueError(f"No column of metrics(model) is in the history, but {listed(history)}.")
    return paths


def _weights_grid(history: History, groups: list[str]) -> None:
    """The fusion weights of all groups, with one legend and the labels of the axes once."""
    require(history, "step")
    grid = _grid(len(groups), size=(6.5, 2.1), share=True)
    for group, ax in zip(groups, grid, strict=True):
        weight_lines(history, columns_of(history, "fusion_weights", group), "step", ax)
        ax.set_title(shown(group), fontsize="medium")
    for ax in grid[-2:]:  # the last of each column, which need not be in the last row
        ax.tick_params(labelbottom=True)
    grid[0].xaxis.set_major_locator(MaxNLocator(4, integer=True))  # of all, which share their axes
    figure = plt.gcf()
    figure.supxlabel("step", fontsize="medium")
    figure.supylabel("fusion weight", fontsize="medium")
    experts = {line.get_label(): line for ax in grid for line in ax.lines}
    figure.legend(handles=list(experts.values()), loc="outside upper center", ncols=4)


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
