r"""Does ExFusion beat the dense model that starts from the mean of the same experts?

    python examples/evidence.py --task images --data /usr/share/datasets/fashion-mnist --at-once 2
    python examples/evidence.py --task text --data TEXTS --at-once 2

Each arm gets the same number of runs to choose its learning rate, which look at a part of the
training data; then each is trained with every seed and tested. Arms that take longer than the
control are compared with it once more at equal time. Stop it and run the same command: runs that
have ended stay, others continue.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import tyro
from support import corpus
from support.arms import ARMS, CANDIDATES, CONTROL, TASKS, Task
from support.comparison import plot, tabulate
from support.study import Job, Result, Spread, Study
from support.table import write_table

TUNING_SEED = 1000
PIECES = 2048  # of the tokenizer


@dataclasses.dataclass
class Settings:
    """Compare all arms on one task.

    Args:
        task: images or text.
        data: of the recipe.
        arms: some of them by name; by default all.
        seeds: to train with.
        extra: more arguments of the recipe.
        out: the folder for runs, tables and plots.
        name: of the table and the plot.
        at_once: runs that go at once, which share the CPU's cores, or have a GPU each.
        launcher: put before the recipe; by default this Python.
        smoke: a moment of two arms, to see that everything works.
    """

    task: Literal["images", "text"] = "images"
    data: Path | None = None
    arms: tuple[str, ...] = (*ARMS, *CANDIDATES)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
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


def choose_rates(task: Task, study: Study, arms: dict[str, str], path: Path) -> dict[str, str]:
    """The best learning rate of each arm, of as many runs each; a table of all is written."""
    jobs = {
        (arm, rate): Job(f"{arguments} --lr {rate} {task.tuning}", TUNING_SEED)
        for arm, arguments in arms.items()
        for rate in task.rates
    }
    found = study.run(list(jobs.values()))
    values = {key: found[job].value for key, job in jobs.items()}
    best = {arm: max(task.rates, key=lambda rate: task.sign * values[arm, rate]) for arm in arms}
    rows = [
        {"arm": arm} | {rate: f"{values[arm, rate]:.3f}" for rate in task.rates} for arm in arms
    ]
    write_table(path, rows)
    return best


def train(
    study: Study, arguments: dict[str, str], seeds: tuple[int, ...]
) -> dict[str, list[Result]]:
    """Train each arm with every seed."""
    jobs = {arm: [Job(given, seed) for seed in seeds] for arm, given in arguments.items()}
    found = study.run([job for of_arm in jobs.values() for job in of_arm])
    return {arm: [found[job] for job in of_arm] for arm, of_arm in jobs.items()}


def longer_control(task: Task, control: str, results: dict[str, list[Result]], arm: str) -> str:
    """Arguments of a control that trains for as long as a slower arm takes."""
    ours, theirs = (
        Spread.of([result.step_ms for result in results[name]]).mean for name in (arm, CONTROL)
    )
    name, length = task.length
    longer = type(length)(length * max(1.0, ours / theirs))
    return f"{control} {name} {longer:.4g}"


def main(settings: Settings) -> None:
    """Choose learning rates, train, and write tables and plots."""
    task, seeds, every = TASKS[settings.task], settings.seeds, ARMS | CANDIDATES
    if settings.smoke:
        task = task._replace(common="--smoke", tuning="", rates=task.rates[:1])
        settings = dataclasses.replace(settings, arms=("control", "mb"))
        seeds = (TUNING_SEED,)
    out = settings.out / settings.task
    data = f"--data {settings.data}" if settings.data else ""
    common = f"{task.common} {data} {settings.extra}"
    if settings.task == "text" and not settings.smoke:
        common += f" --tokenizer {shared_tokenizer(settings.data, out)}"
    runs, launcher = out / "runs", settings.launcher
    study = Study(task.recipe, common, runs, task.measure, settings.at_once, launcher)
    arms = {arm: every[arm] for arm in (CONTROL, *settings.arms)}  # each once
    rates = choose_rates(task, study, arms, out / f"{settings.name}_rates.md")
    length = " ".join(map(str, task.length)) if not settings.smoke else ""
    tuned = {arm: f"{given} --lr {rates[arm]}" for arm, given in arms.items()}
    results = train(study, {arm: f"{given} {length}" for arm, given in tuned.items()}, seeds)
    if "mb" in results and not settings.smoke:
        longer = longer_control(task, tuned[CONTROL], results, "mb")
        results |= train(study, {"control, as long as mb takes": longer}, seeds)
    print(tabulate(out / f"{settings.name}.md", results, CONTROL, task.title, {}))
    plot(
        out / f"{settings.name}.svg", results, CONTROL, f"{settings.task}, equal steps", task.title
    )
    apart = [
        {"arm": arm, "spread of displacements": str(Spread.of(spreads))}
        for arm, found in results.items()
        if (spreads := [result.spread for result in found if result.spread is not None])
    ]
    if apart:
        print(write_table(out / f"{settings.name}_spread.md", apart))


if __name__ == "__main__":
    main(tyro.cli(Settings))
