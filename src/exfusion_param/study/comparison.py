"""Arms side by side: rates chosen for each, equal steps, equal time, a table and a sentence."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .processes import finish
from .rates import Better, Grid, choose_rates
from .runs import Result, Run, Trial, error_of, require_same
from .statistics import CONFIDENCE, Spread, paired, smallest_told


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The results of a study; `str()` of it is the table and the sentence.

    Args:
        results: of each arm, one for each seed, in the same order.
        control: the arm that the others are compared with.
        judged: the arms that the sentence is about, each with the arm that it is compared with.
        metric: what is measured.
        better: whether more of the metric is better, or less.
        lr: the learning rate of each arm, where there is a grid.
        tuning: what was tried to choose it, by arm and rate.
        notes: what the figures do not show.

    Example:
        >>> trial = lambda run: run.seed + {"control": 1.0, "ours": 1.5}[run.arm]
        >>> arms = {"control": "control", "ours": "ours"}
        >>> found = compare(trial, arms, control="control", out="runs", seeds=(0, 1, 2))
        >>> found.difference("ours").mean
        0.5
    """

    results: Mapping[str, Sequence[Result]]
    control: str
    judged: Mapping[str, str]
    metric: str
    better: Better
    lr: Mapping[str, float | None]
    tuning: Grid
    notes: Sequence[str] = ()

    def values(self, arm: str) -> list[float]:
        """The metric of an arm, one for each seed."""
        return [result.metric for result in self.results[arm]]

    def difference(self, arm: str, control: str | None = None) -> Spread:
        """How far an arm is from the control, seed by seed; its `error` is the standard error."""
        return paired(self.values(arm), self.values(control or self.control))

    def table(self) -> list[dict[str, str]]:
        """One row for each arm; its values are texts."""
        times = {arm: _usual_seconds(found) for arm, found in self.results.items()}
        places, size = self._places(), len(self.results[self.control])
        rows = []
        for arm in self.results:
            row = {"arm": arm}
            if (lr := self.lr.get(arm)) is not None:
                row["rate"] = f"{lr:g}"
            difference = self.difference(arm)
            row[f"{self.metric}, {size} seed{'s' * (size > 1)}"] = Spread.of(
                self.values(arm)
            ).shown(places)
            minus = "" if arm == self.control else _signed(difference, places)
            row[f"minus {self.control}"] = minus
            row[f"time, {self.control} = 1"] = f"{times[arm] / times[self.control]:.2f}"
            rows.append(row)
        return rows

    def sentence(self) -> str:
        """Describe in a sentence which differences are significant."""
        size = len(self.results[self.control])
        if size == 1:
            return "One seed cannot tell a difference from chance: give at least two."
        clauses = [self._clause(arm, other) for arm, other in self.judged.items()]
        together = "" if len(clauses) == 1 else f" for all {len(clauses)} comparisons together"
        return f"With {size} seeds, at {CONFIDENCE:.0%} confidence{together}: {'; '.join(clauses)}."

    def __str__(self) -> str:
        notes = "".join(f"\n{note}" for note in self.notes)
        return f"{markdown(self.table())}\n{self.sentence()}{notes}"

    def _clause(self, arm: str, other: str) -> str:
        difference, places = self.difference(arm, other), self._places()
        if math.isnan(difference.mean):
            return f"{arm} or {other} has a {self.metric} of nan"
        if difference.mean == difference.deviation == 0:
            return f"{arm} equals {other} in every seed"
        subject = f"{arm}," if "," in arm else arm
        bound = smallest_told(difference, len(self.judged))
        is_more = (difference.mean > 0) == (self.better == "more")
        size = f"{abs(difference.mean):.{places}f} ± {difference.error:.{places}f}"
        side = f"{subject} is {size} {'better' if is_more else 'worse'} than {other}"
        if abs(difference.mean) > bound:
            return f"{side}, which is significant (more than {bound:.{places}f})"
        return f"{side}, which is not significant (less than {bound:.{places}f})"

    def _places(self) -> int:
        """Decimal places that show two digits of a usual error."""
        errors = [self.difference(arm).error for arm in self.results]
        real = [error for error in errors if error > 0]
        return max(0, 1 - math.floor(math.log10(statistics.median(real)))) if real else 3


def compare(
    trial: Trial,
    arms: Mapping[str, str],
    *,
    control: str,
    out: str | Path,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    rates: Sequence[float] = (),
    tuning_seeds: Sequence[int] = (1000, 1001),
    better: Better = "more",
    equal_time: str | None = None,
    at_once: int = 1,
    metric: str = "metric",
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Comparison:
    """Train every arm with every seed, and compare each arm with the control.

    Finished runs are recorded in `out/runs`; the same call does only the runs that are missing.

    Args:
        trial: does one run, and returns the metric, or a dict of numbers with the key "metric".
        arms: maps the name of each arm in the table to the value of `Run.arm`.
        control: the name of the arm that the others are compared with.
        out: the folder of the study.
        seeds: seeds of the compared runs; differences are taken seed by seed.
        rates: learning rates; each arm uses the best of them. A single rate is used without a run.
        tuning_seeds: seeds of the runs that choose rates; `Run.tuning` is true in them.
        better: whether "more" or "less" of the metric is better.
        equal_time: an arm; the control is trained once more, for as long as this arm takes
            (`Run.length`). None leaves this out.
        at_once: the number of parallel processes, which share the cores, or get one GPU each.
        metric: the name of the metric in the table, with its unit.
        settings: other plain values that the results depend on. A folder takes only one set.

    Returns:
        The results; `print` it for the table and a sentence about significance.

    Raises:
        RuntimeError: some runs failed. The others are kept.
        TypeError: a run does not return a number, or cannot be started in another process.
        ValueError: there are no seeds, `at_once` is below 1, no arm has the control's name, or
            `out` holds a study with other settings.

    Example:
        >>> trial = lambda run: run.seed + {"control": 1.0, "ours": 1.5}[run.arm]
        >>> arms = {"control": "control", "ours": "ours"}
        >>> found = compare(trial, arms, control="control", out="runs", seeds=(0, 1, 2))
        >>> print(found.sentence())
        With 3 seeds, at 95% confidence: ours is 0.500 ± 0.000 better than control, which is sig...
    """
    _check(arms, control, seeds, tuning_seeds, rates)
    require_same(Path(out), dict(settings))
    folder = Path(out) / "runs"
    lr, tuning, notes = choose_rates(trial, arms, rates, tuning_seeds, better, folder, at_once)
    planned = {arm: [Run(name, seed, lr[arm]) for seed in seeds] for arm, name in arms.items()}
    results = _all(trial, planned, folder, at_once)
    judged = {arm: control for arm in arms if arm != control}
    if equal_time is not None:
        ratio = _usual_seconds(results[equal_time]) / _usual_seconds(results[control])
        longer, length = f"{control}, as long as {equal_time} takes", max(1.0, round(ratio, 2))
        more = [Run(arms[control], seed, lr[control], length) for seed in seeds]
        results |= _all(trial, {longer: more}, folder, at_once)
        lr[longer] = lr[control]
        judged[longer] = equal_time
    return Comparison(results, control, judged, metric, better, lr, tuning, notes)


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same columns as a table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _all(
    trial: Trial, planned: Mapping[str, Sequence[Run]], folder: Path, at_once: int
) -> dict[str, list[Result]]:
    """The results of all runs, done one seed after another, so that the arms' times compare."""
    by_seed = [run for runs in zip(*planned.values(), strict=True) for run in runs]
    found, failures = finish(trial, by_seed, folder, at_once)
    if failures:
        reasons = "\n".join(f"  {run}: {why}" for run, why in failures.items())
        raise RuntimeError(
            f"{len(failures)} of {len(by_seed)} runs failed. The others are kept; the same call "
            f"starts only these again:\n{reasons}\n"
            f"{error_of(next(iter(failures)), folder)} has the traceback, if there was one."
        )
    return {arm: [found[run] for run in runs] for arm, runs in planned.items()}


def _check(
    arms: Mapping[str, str],
    control: str,
    seeds: Sequence[int],
    tuning_seeds: Sequence[int],
    rates: Sequence[float],
) -> None:
    if control not in arms:
        raise ValueError(f"control must be one of the arms ({', '.join(arms)}), got {control!r}.")
    for name, given in (("seeds", seeds), ("tuning_seeds", tuning_seeds), ("rates", rates)):
        if len(set(given)) != len(given) or (not given and name == "seeds"):
            raise ValueError(f"{name} must be different numbers, got {list(given)}.")
    if len(rates) > 1 and (not tuning_seeds or set(tuning_seeds) & set(seeds)):
        raise ValueError(
            "tuning_seeds must differ from seeds, because a rate looks better than it is on the "
            f"seeds that it was chosen by; got {list(tuning_seeds)}."
        )


def _usual_seconds(found: Sequence[Result]) -> float:
    return statistics.median(result.seconds for result in found)  # a first run may take longer


def _signed(difference: Spread, places: int) -> str:
    error = f" ± {difference.error:.{places}f}" if difference.size > 1 else ""
    return f"{difference.mean:+.{places}f}{error}"
