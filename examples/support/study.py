"""Many runs of a recipe, several at once; what is done is not done again."""

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

EXAMPLES = Path(__file__).parents[1]


class Job(NamedTuple):
    """One run of a recipe: its arguments besides the study's, and its seed."""

    arguments: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder; jobs of several tables with equal arguments are one run."""
        words = re.sub(r"[^\w.]+", "-", self.arguments.replace("--", " ")).strip("-")
        return f"{words or 'default'}/seed-{self.seed}"


class Result(NamedTuple):
    """What a run has measured.

    Args:
        value: of the study's measure at the end.
        rows: of all its evaluations.
        seconds: of training.
        step_ms: median time of a step.
        spread: of the experts' displacements (experts_apart.py); None without experts.
        folder: of the run.
    """

    value: float
    rows: list[dict[str, float]]
    seconds: float
    step_ms: float
    spread: float | None
    folder: Path


class Study:
    """Runs of one recipe.

    Args:
        recipe: a script in examples/.
        common: arguments of all runs.
        out: the folder; each run has one in it.
        measure: what is compared, a column of the recipe's results.
        at_once: how many runs go at once; they share the CPU's cores, or have a GPU each.
        launcher: put before the script, such as "torchrun --nproc-per-node 8".
    """

    def __init__(
        self,
        recipe: str,
        common: str,
        out: Path,
        measure: str,
        at_once: int = 1,
        launcher: str = sys.executable,
    ) -> None:
        self.recipe, self.common, self.out, self.measure = recipe, common, out, measure
        self.at_once, self.launcher = at_once, launcher

    def run(self, jobs: Sequence[Job]) -> dict[Job, Result]:
        """Run what has not ended yet, and read all results.

        Raises:
            SystemExit: some run failed; the others have ended, and stay.
        """
        waiting = [job for job in dict.fromkeys(jobs) if not self._results(job).exists()]
        places: Queue[int] = Queue()
        for place in range(self.at_once):
            places.put(place)

        def launch(job: Job) -> str:
            place = places.get()
            try:
                return self._launch(job, place)
            finally:
                places.put(place)

        with ThreadPoolExecutor(self.at_once) as pool:
            started = pool.map(launch, waiting)
            failures = [text for text in tqdm(started, total=len(waiting), unit="run") if text]
        if failures:
            raise SystemExit("\n".join(failures))
        return {job: self._read(job) for job in jobs}

    def compare(self, arms: Mapping[str, str], seeds: Sequence[int]) -> dict[str, list[Result]]:
        """Run all arms with every seed, one seed after another, so that their times compare.

        Args:
            arms: the arguments of each.
            seeds: the order of each arm's results.
        """
        jobs = {arm: [Job(arguments, seed) for seed in seeds] for arm, arguments in arms.items()}
        found = self.run([job for of_seed in zip(*jobs.values(), strict=True) for job in of_seed])
        return {arm: [found[job] for job in of_arm] for arm, of_arm in jobs.items()}

    def _launch(self, job: Job, place: int) -> str:
        """Run one; what went wrong, if anything did."""
        folder = self.out / job.name
        folder.mkdir(parents=True, exist_ok=True)
        cores = max(1, (os.cpu_count() or 1) // self.at_once)
        environment = {"OMP_NUM_THREADS": str(cores)} | os.environ
        if torch.cuda.is_available() and "torchrun" not in self.launcher:
            environment["CUDA_VISIBLE_DEVICES"] = str(place % torch.cuda.device_count())
        script = [*shlex.split(self.launcher), str(EXAMPLES / self.recipe)]
        own = [*shlex.split(job.arguments), "--seed", str(job.seed), "--out", str(folder)]
        command = [*script, *shlex.split(self.common), *own]
        with (folder / "log.txt").open("w") as log:
            ended = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
        if ended.returncode == 0 and self._results(job).exists():
            return ""
        return f"{shlex.join(command)} ended with {ended.returncode}; see {folder / 'log.txt'}"

    def _results(self, job: Job) -> Path:
        return self.out / job.name / "results.json"

    def _read(self, job: Job) -> Result:
        found: Mapping[str, Any] = json.loads(self._results(job).read_text())
        rows = found["rows"]
        return Result(
            value=rows[-1][self.measure],
            rows=rows,
            seconds=found["seconds"],
            step_ms=found["step_ms"],
            spread=found["spread"],
            folder=self.out / job.name,
        )


class Spread(NamedTuple):
    """Mean and standard deviation of a sample of this size."""

    mean: float
    deviation: float
    size: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of some values."""
        deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
        return cls(statistics.fmean(values), deviation, len(values))

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.deviation / self.size**0.5

    def __str__(self) -> str:
        if self.size == 1:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ± {self.deviation:.3f}"
