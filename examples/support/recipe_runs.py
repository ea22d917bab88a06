"""Recipes as the trials of a study: each run of a script is a process with a folder of its own."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from exfusion_param import study

EXAMPLES = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Runs a script in examples/, with a run's arm as arguments.

    Args:
        script: the recipe.
        common: arguments of all runs.
        out: the folder; each run has one in it.
        measure: what is compared, a column of the recipe's results.
        tuning: more arguments of runs that choose a learning rate.
        length: the argument that says how long other runs are, and its value; None for none.
        launcher: put before the script, such as "torchrun --nproc-per-node 8".
    """

    script: str
    common: str
    out: Path
    measure: str
    tuning: str = ""
    length: tuple[str, float] | None = None
    launcher: str = sys.executable

    def __call__(self, run: study.Run) -> dict[str, float]:
        """One run.

        Raises:
            RuntimeError: the script failed.
        """
        folder = self.folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        env = dict(os.environ)
        command = [*shlex.split(self.launcher), str(EXAMPLES / self.script), *self.arguments(run)]
        with (folder / "log.txt").open("w") as log:
            ended = subprocess.run(command, stdout=log, stderr=log, env=env, check=False)
        if ended.returncode != 0:
            code, said = ended.returncode, folder / "log.txt"
            raise RuntimeError(f"{shlex.join(command)} ended with {code}; see {said}")
        found = self.results(run)
        last = found["rows"][-1]
        numbers = {"metric": last[self.measure], "seconds": last["step"] * found["step_ms"] / 1000}
        return numbers | ({} if found["spread"] is None else {"spread": found["spread"]})

    def arguments(self, run: study.Run) -> list[str]:
        """Those of the script."""
        words = [self.common, run.arm]
        if run.lr is not None:
            words.append(f"--lr {run.lr}")
        if run.tuning:
            words.append(self.tuning)
        elif self.length is not None:
            name, usual = self.length
            words.append(f"{name} {type(usual)(round(usual * run.length, 3))}")
        own = ["--seed", str(run.seed), "--out", str(self.folder(run))]
        return [*shlex.split(" ".join(words)), *own]

    def folder(self, run: study.Run) -> Path:
        """A run's."""
        return self.out / run.name

    def results(self, run: study.Run) -> dict[str, Any]:
        """What the script has left."""
        found: dict[str, Any] = json.loads((self.folder(run) / "results.json").read_text())
        return found


def plot_curves(path: Path, found: study.Comparison, recipe: Recipe, title: str) -> None:
    """Draw the measure over the course of training, the mean over the seeds of each arm."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (arm, results) in enumerate(found.results.items()):
        curves = [recipe.results(result.run)["rows"] for result in results]
        evaluations = list(zip(*curves, strict=True))
        steps = [rows[0]["step"] for rows in evaluations]
        means = [_mean([row[recipe.measure] for row in rows]) for rows in evaluations]
        style = ("-", "--", ":")[number // 10 % 3]
        axes.plot(steps, means, style, marker=".", color=f"C{number % 10}", label=arm)
    axes.set(title=title, xlabel="step", ylabel=recipe.measure.replace("_", " "))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    figure.savefig(path)


def _mean(values: Sequence[float]) -> float:
    return study.Spread.of(values).mean
