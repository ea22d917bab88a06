"""Results of a study side by side: a table, and a plot with every seed in it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from support.study import Result, Spread
from support.table import write_table

Results = Mapping[str, Sequence[Result]]
"""By the name of each arm its results, one for each seed, in the same order."""


def differences(results: Results, arm: str, control: str) -> Spread:
    """How far an arm is from its control, seed by seed."""
    pairs = zip(results[arm], results[control], strict=True)
    return Spread.of([ours.value - theirs.value for ours, theirs in pairs])


def tabulate(
    path: Path, results: Results, control: str, measure: str, paper: Mapping[str, str]
) -> str:
    """Write a table: mean and deviation over seeds, difference from the control and its error.

    Args:
        path: of the Markdown file.
        results: of all arms.
        control: the arm that the others are compared with.
        measure: heads the column of values.
        paper: what the paper gives for an arm.
    """
    fastest = Spread.of([result.step_ms for result in results[control]]).mean
    rows = []
    for arm, found in results.items():
        difference = differences(results, arm, control)
        error = f" ± {difference.error:.3f}" if difference.size > 1 else ""
        row = {
            "arm": arm,
            f"{measure}, {len(found)} seeds": str(Spread.of([r.value for r in found])),
            f"minus {control}": "" if arm == control else f"{difference.mean:+.3f}{error}",
            f"step, {control} = 1": f"{Spread.of([r.step_ms for r in found]).mean / fastest:.2f}",
        }
        rows.append(row | ({"paper": paper.get(arm, "")} if paper else {}))
    return write_table(path, rows)


def plot(path: Path, results: Results, control: str, title: str, measure: str) -> None:
    """Draw the mean of each arm, its standard error and every seed; a line is the control."""
    figure = Figure(figsize=(7, 0.8 + 0.32 * len(results)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(Spread.of([r.value for r in results[control]]).mean, color="0.8", zorder=0)
    for place, found in enumerate(results.values()):
        values = [result.value for result in found]
        spread = Spread.of(values)
        error = spread.error if spread.size > 1 else 0.0
        axes.plot(values, [place] * len(values), "o", color="0.6", markersize=3)
        axes.errorbar(spread.mean, place, xerr=error, fmt="o", color="C0", capsize=3)
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.set(title=title, xlabel=measure)
    figure.savefig(path)


def plot_curves(path: Path, results: Results, measure: str, title: str) -> None:
    """Draw a measure over the course of training, the mean over the seeds of each arm."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (arm, found) in enumerate(results.items()):
        evaluations = list(zip(*(result.rows for result in found), strict=True))
        steps = [rows[0]["step"] for rows in evaluations]
        means = [Spread.of([row[measure] for row in rows]).mean for rows in evaluations]
        style = ("-", "--", ":")[number // 10 % 3]
        axes.plot(steps, means, style, marker=".", color=f"C{number % 10}", label=arm)
    axes.set(title=title, xlabel="step", ylabel=measure.replace("_", " "))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    figure.savefig(path)
