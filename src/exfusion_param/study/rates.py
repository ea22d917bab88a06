"""Learning rates: each arm chooses its own, by as many runs as any other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from .processes import finish
from .runs import Run, Trial
from .statistics import Spread

Better = Literal["more", "less"]
Grid = Mapping[str, Mapping[float, Spread]]
"""By arm and learning rate the metric over the tuning seeds."""


def choose_rates(
    trial: Trial,
    arms: Mapping[str, str],
    rates: Sequence[float],
    seeds: Sequence[int],
    better: Better,
    folder: Path,
    at_once: int,
) -> tuple[dict[str, float | None], Grid, list[str]]:
    """The rate of each arm that is best over the tuning seeds, all that were tried, and notes.

    Raises:
        RuntimeError: every rate of an arm failed or gave nan.
    """
    if len(rates) < 2:
        return dict.fromkeys(arms, rates[0] if rates else None), {}, []
    grid = {
        (arm, lr): [Run(name, seed, lr, tuning=True) for seed in seeds]
        for lr in sorted(rates)
        for arm, name in arms.items()
    }
    found, failures = finish(
        trial, [r for runs in zip(*grid.values(), strict=True) for r in runs], folder, at_once
    )
    scores: dict[str, dict[float, Spread]] = {arm: {} for arm in arms}
    for (arm, lr), runs in grid.items():
        if not failures.keys() & set(runs):
            scores[arm][lr] = Spread.of([found[run].metric for run in runs])
    sign = 1 if better == "more" else -1
    chosen: dict[str, float | None] = {}
    notes = [
        f"{run} failed, so that its rate was not chosen: {why}" for run, why in failures.items()
    ]
    for arm in arms:
        means = {lr: sign * of.mean for lr, of in scores[arm].items()}
        mine = {lr: mean for lr, mean in means.items() if not math.isnan(mean)}
        if not mine:
            raise RuntimeError(f"{arm} failed or gave nan at every rate.\n" + "\n".join(notes))
        chosen[arm] = max(mine, key=lambda lr: mine[lr])
    if at_end := [arm for arm, lr in chosen.items() if lr in (min(rates), max(rates))]:
        notes.append(
            f"Took an end of the grid, so a wider one may suit better: {', '.join(at_end)}."
        )
    return chosen, scores, notes
