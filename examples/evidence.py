r"""Does ExFusion beat the dense model that starts from the mean of the same experts?

    python examples/evidence.py --task images --data /usr/share/datasets/fashion-mnist --at-once 2
    python examples/evidence.py --task text --data TEXTS --at-once 2
    python examples/evidence.py --task images --data FOLDER --scale gpu --at-once 4

Each arm gets the same number of runs to choose its learning rate, which test on other data than
the rest; then each is trained with every seed and tested. The control is trained once more, for as
long as `mb` takes. Stop it and run the same command: runs that have ended stay, others continue.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import tyro

from support import corpus
from support.arms import ARMS, CANDIDATES, CONTROL, TASKS, Measure, Task
from support.comparison import plot, plot_curves, tabulate
from support.study import Result, Spread, Study
from support.table import write_table

PIECES = 2048  # of the tokenizer


@dataclasses.dataclass
class Settings:
    """Compare all arms on one task.

    Args:
        task: images or text.
        scale: small, or what takes a GPU some hours.
        data: of the recipe.
        arms: some of them by name; by default all.
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
    scale: Literal["small", "gpu"] = "small"
    data: Path | None = None
    arms: tuple[str, ...] = (*ARMS, *CANDIDATES)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (1000, 1001)
    rates: tuple[str, ...] = ()
    length: float | None = None
    extra: str = ""
    out: Path = Path("runs/evidence")
    name: str = "results"
    at_once: int = 1
    launcher: str = sys.executable
    smoke: bool = False


def shared_tokenizer(data: Path | None, out: Path) -> Path:
    """A tokenizer that all runs share, as two trainings of one may differ in a few pieces."""
    path = out / "tokenizer.json"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        files = corpus.files_in(data or corpus.EMBEDDED)
        corpus.train_tokenizer(files, PIECES).save(str(path))
    return path


def choose_rates(
    task: Task, study: Study, arms: dict[str, str], seeds: tuple[int, ...], path: Path
) -> dict[str, str]:
    """The best learning rate of each arm, of as many runs each; a table of all is written."""
    if len(task.rates) == 1:
        return dict.fromkeys(arms, task.rates[0])
    found: dict[str, dict[str, Spread]] = {arm: {} for arm in arms}
    for rate in task.rates:
        tried = {arm: f"{given} --lr {rate} {task.tuning}" for arm, given in arms.items()}
        for arm, results in study.compare(tried, seeds).items():
            found[arm][rate] = Spread.of([result.value for result in results])
    rows = [{"arm": arm} | {rate: str(of) for rate, of in found[arm].items()} for arm in arms]
    write_table(path, rows)
    sign = task.measure.sign
    return {arm: max(of, key=lambda rate: sign * of[rate].mean) for arm, of in found.items()}


def longer_control(task: Task, control: str, results: dict[str, list[Result]], arm: str) -> str:
    """Arguments of a control that trains for as long as a slower arm takes."""
    ours, theirs = (
        Spread.of([result.step_ms for result in results[name]]).mean for name in (arm, CONTROL)
    )
    longer = task.lasting(task.length[1] * max(1.0, ours / theirs))
    return f"{control} {longer.argument}"


def report(measure: Measure, results: dict[str, list[Result]], title: str, path: Path) -> None:
    """Write tables and plots; their names begin as the path does."""

    def named(end: str) -> Path:
        return path.with_name(path.name + end)

    print(tabulate(named(".md"), results, CONTROL, measure.title, {}))
    plot(named(".svg"), results, CONTROL, title, measure.title)
    if all(len(result.rows) > 1 for found in results.values() for result in found):
        plot_curves(named("_curves.svg"), results, measure.name, title)
    apart = [
        {"arm": arm, "spread of displacements": str(Spread.of(spreads))}
        for arm, found in results.items()
        if (spreads := [result.spread for result in found if result.spread is not None])
    ]
    if apart:
        print(write_table(named("_spread.md"), apart))


def main(settings: Settings) -> None:
    """Choose learning rates, train, and write tables and plots."""
    task, every = TASKS[settings.task, settings.scale], ARMS | CANDIDATES
    if settings.smoke:
        task = task._replace(common="--smoke", tuning="", rates=task.rates[:1])
        one = {"arms": ("control", "mb"), "seeds": (0,), "tuning_seeds": (0,)}
        settings = dataclasses.replace(settings, **one)  # type: ignore[arg-type]
    if settings.length is not None:
        task = task.lasting(settings.length)
    task = task._replace(rates=settings.rates or task.rates)
    out, seeds = settings.out / settings.task / settings.scale, settings.seeds
    data = f"--data {settings.data}" if settings.data else ""
    common = f"{task.common} {data} {settings.extra}"
    if settings.task == "text" and not settings.smoke:
        common += f" --tokenizer {shared_tokenizer(settings.data, out)}"
    runs, launcher = out / "runs", settings.launcher
    study = Study(task.recipe, common, runs, task.measure.name, settings.at_once, launcher)
    arms = {arm: every[arm] for arm in (CONTROL, *settings.arms)}  # each once
    best = choose_rates(task, study, arms, settings.tuning_seeds, out / f"{settings.name}_rates.md")
    length = task.argument if not settings.smoke else ""
    tuned = {arm: f"{given} --lr {best[arm]}" for arm, given in arms.items()}
    results = study.compare({arm: f"{given} {length}" for arm, given in tuned.items()}, seeds)
    if "mb" in results and not settings.smoke:
        longer = longer_control(task, tuned[CONTROL], results, "mb")
        results |= study.compare({"control, as long as mb takes": longer}, seeds)
    report(task.measure, results, f"{settings.task}, equal steps", out / settings.name)


if __name__ == "__main__":
    main(tyro.cli(Settings))
