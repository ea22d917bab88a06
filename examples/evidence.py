r"""Does ExFusion beat the dense model that starts from the mean of the same experts?

    python examples/evidence.py --task images --data /usr/share/datasets/fashion-mnist --at-once 2
    python examples/evidence.py --task text --data TEXTS --at-once 2
    python examples/evidence.py --task images --data FOLDER --scale few
    python examples/evidence.py --task images --data FOLDER --scale gpu --at-once 4

Each arm gets the same number of runs to choose its learning rate, which test on other data than
the rest; then each is trained with every seed and tested. The control is trained once more, for as
long as `mb` takes, or another arm. Stop it and run the same command: runs that have ended stay,
others continue.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import tyro

from exfusion_param import study
from exfusion_param.study.figure import plot
from support import corpus
from support.arms import ARMS, CANDIDATES, CONTROL, TASKS
from support.recipe_runs import Recipe, plot_curves
from support.table import write_table


@dataclasses.dataclass
class Settings:
    """Compare all arms on one task.

    Args:
        task: images or text.
        scale: small, few images for many epochs, or what takes a GPU some hours.
        data: of the recipe.
        arms: some of them by name; by default all.
        equal_time: the arm whose time a longer control gets, if it is one of them.
        seeds: to train with.
        tuning_seeds: of the runs that choose learning rates.
        rates: learning rates to choose from; by default the scale's. One needs no such runs.
        length: epochs or steps of the runs that are compared; by default as the scale has it.
        extra: more arguments of the recipe, as in --extra="--workers 4".
        out: the folder for runs, tables and plots.
        name: of the table and the plot.
        at_once: runs that go at once, which share the CPU's cores, or have a GPU each.
        launcher: put before the recipe; by default this Python.
        smoke: a moment of two arms, to see that everything works.
    """

    task: Literal["images", "text"] = "images"
    scale: Literal["small", "few", "gpu"] = "small"
    data: Path | None = None
    arms: tuple[str, ...] = (*ARMS, *CANDIDATES)
    equal_time: str = "mb"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (1000, 1001)
    rates: tuple[float, ...] = ()
    length: float | None = None
    extra: str = ""
    out: Path = Path("runs/evidence")
    name: str = "results"
    at_once: int = 1
    launcher: str = sys.executable
    smoke: bool = False


def report(
    found: study.Comparison, recipe: Recipe, title: str, path: Path, paper: Mapping[str, str]
) -> None:
    """Write tables and plots; their names begin as the path does."""

    def named(end: str) -> Path:
        return path.with_name(path.name + end)

    print(found)
    column = (lambda arm: {"paper": paper.get(arm, "")}) if paper else lambda arm: {}
    write_table(named(".md"), [row | column(row["arm"]) for row in found.table()])
    if found.tuning:
        rows = [
            {"arm": arm} | {f"{lr:g}": str(tried) for lr, tried in of.items()}
            for arm, of in found.tuning.items()
        ]
        write_table(named("_rates.md"), rows)
    values = {arm: found.values(arm) for arm in found.results}
    plot(named(".svg"), values, CONTROL, found.metric, title)
    runs = [result.run for results in found.results.values() for result in results]
    if all(len(recipe.results(run)["rows"]) > 1 for run in runs):
        plot_curves(named("_curves.svg"), found, recipe, title)
    apart = [
        {"arm": arm, "spread of displacements": str(study.Spread.of(spreads))}
        for arm, results in found.results.items()
        if (spreads := [result.more["spread"] for result in results if "spread" in result.more])
    ]
    if apart:
        print(write_table(named("_spread.md"), apart))


def main(settings: Settings) -> None:
    """Choose learning rates, train, and write tables and plots."""
    task, every = TASKS[settings.task, settings.scale], ARMS | CANDIDATES
    if settings.smoke:
        task = task._replace(common="--smoke", tuning="", rates=task.rates[:1])
        one = {"arms": ("control", "mb"), "seeds": (0,)}
        settings = dataclasses.replace(settings, **one)  # type: ignore[arg-type]
    if settings.length is not None:
        task = task.lasting(settings.length)
    out = settings.out / settings.task / settings.scale
    data = f"--data {settings.data}" if settings.data else ""
    common = f"{task.common} {data} {settings.extra}"
    if settings.task == "text" and not settings.smoke:
        common += f" --tokenizer {corpus.tokenizer_in(out, settings.data)}"
    recipe = Recipe(
        task.recipe,
        common,
        out / f"{task.length[1]:g}" / "work",
        task.measure.name,
        tuning=task.tuning,
        length=None if settings.smoke else task.length,
        launcher=settings.launcher,
    )
    found = study.compare(
        recipe,
        {arm: every[arm] for arm in (CONTROL, *settings.arms)},  # each once
        control=CONTROL,
        out=out / f"{task.length[1]:g}",
        seeds=settings.seeds,
        rates=settings.rates or task.rates,
        tuning_seeds=settings.tuning_seeds,
        better="more" if task.measure.sign > 0 else "less",
        equal_time=None
        if settings.smoke or settings.equal_time not in settings.arms
        else settings.equal_time,
        at_once=settings.at_once,
        metric=task.measure.title,
        settings={"arguments": common, "smoke": settings.smoke},
    )
    report(found, recipe, f"{settings.task}, equal steps", out / settings.name, task.measure.paper)


if __name__ == "__main__":
    main(tyro.cli(Settings))
