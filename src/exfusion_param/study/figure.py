"""The plot of a study; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .statistics import Spread


def plot(
    path: Path, values: Mapping[str, Sequence[float]], control: str, metric: str, title: str = ""
) -> None:
    """Draw the mean of each arm, its standard error and the value of every seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.8 + 0.32 * len(values)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(Spread.of(values[control]).mean, color="0.8", zorder=0)
    for place, found in enumerate(values.values()):
        spread = Spread.of(found)
        error = spread.error if spread.size > 1 else 0.0
        axes.plot(found, [place] * len(found), "o", color="0.6", markersize=3)
        axes.errorbar(spread.mean, place, xerr=error, fmt="o", color="C0", capsize=3)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set(title=title, xlabel=metric)
    figure.savefig(path)
