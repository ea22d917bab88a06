"""Breaks runs in every way that we know, and counts what was lost: `make faults`.

Each fault ends in a continuation that equals the undisturbed run bit by bit, or in one clear error;
anything else counts as a wrong result. The table goes to docs/faults.md.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import tyro
from safetensors.torch import load_file

from fault_files import corrupt_checkpoints, fuzz_files
from fault_steps import fill_disks, poison
from soak import Usage, soak

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "resume_train.py"
SMALL = ["--epochs", 4, "--batch-size", 32, "--dim", 32, "--depth", 2, "--save-every", 5]
"""Of the run that is disturbed: 4 epochs of 31 steps on one process, of 15 on two."""


HEADER = """# Faults

This page lists the faults that were injected into runs, and the results. `make faults` repeats
this and writes the page. A fault is survived if the run continues, or if a single error explains
what to do. A step counts as lost if it has to be repeated after restarting from the last
checkpoint; these runs save one every 5 steps. For damaged checkpoints, the column counts
checkpoints instead of steps. A result is wrong if the final model differs in any bit from that of
the undisturbed run, if a state is resumed that was never saved, or if an error does not explain
anything. The run is `examples/resume_train.py`: dropout, a memory bank, ExpertAdamW, a schedule,
torchdata's loader and asynchronous checkpoints, with FSDP2 if there are two processes. The second
table shows the resources that a long run holds, with accumulation, clipping, an average of the
weights, metrics, records of the routers, and one checkpoint every 200 steps.
[Borders](borders.md) counts what other people's code does to wrapped models.
"""


@dataclasses.dataclass
class Row:
    """What one fault did.

    Args:
        fault: its name.
        times: that it was injected.
        survived: times after which the run went on, or said clearly why not.
        lost_steps: of a run, mean for each time.
        wrong: results that were silently wrong.
    """

    fault: str
    times: int
    survived: int
    lost_steps: float
    wrong: int


@dataclasses.dataclass
class Settings:
    """Break runs.

    Args:
        kills: of one process at random moments, and as many of one of two.
        stops: by SIGTERM, of one process and of two.
        steps: with a full disk, and as many with NaN or inf.
        corruptions: of checkpoints.
        files: of strangers to open.
        soak: steps of a long run.
        seed: of the moments and the bytes.
        limit: images that runs train on.
        out: the table; None only prints it.
    """

    kills: int = 25
    stops: int = 5
    steps: int = 50
    corruptions: int = 200
    files: int = 1000
    soak: int = 20_000
    seed: int = 0
    limit: int = 1000
    out: Path | None = ROOT / "docs" / "faults.md"


def command(ranks: int, folder: Path, limit: int) -> list[str]:
    """What a user types to start or to continue the run."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        launcher += ["--max-restarts", "1000", "--monitor-interval", "0.1"]
    arguments = [*SMALL, "--limit", limit, "--out", folder]
    return [*launcher, str(SCRIPT), *map(str, arguments)]


def start(ranks: int, folder: Path, limit: int) -> subprocess.Popen[bytes]:
    """Start or continue the run."""
    return subprocess.Popen(
        command(ranks, folder, limit),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def steps_logged(folder: Path) -> list[int]:
    """The steps of metrics.csv, in the order in which they were done."""
    path = folder / "metrics.csv"
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    return [int(line.split(",")[0]) for line in lines if line.split(",")[0].isdigit()]


def wait_for_a_moment(process: subprocess.Popen[bytes], folder: Path, after: float) -> bool:
    """Wait until the run has trained on, and some time more; false if it ended before."""
    before = len(steps_logged(folder))
    while process.poll() is None and len(steps_logged(folder)) == before:
        time.sleep(0.02)
    time.sleep(after)
    return process.poll() is None


def workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The ranks, or the process itself."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if SCRIPT.name in " ".join(child.cmdline())] or [
        psutil.Process(process.pid)
    ]


def disturbed_run(
    ranks: int, times: int, limit: int, hit: Callable[[subprocess.Popen[bytes]], None]
) -> tuple[int, int, bool]:
    """Hit a run until it was hit often enough, over as many whole runs as that takes.

    Returns:
        How often it was hit, the steps that were done twice, and whether each run ended with the
        dense model of an undisturbed one.
    """
    hits, repeated, equal = 0, 0, True
    with tempfile.TemporaryDirectory() as folder:
        calm = Path(folder, "calm")
        start(ranks, calm, limit).wait()
        while hits < times:
            out = Path(folder, "run")
            shutil.rmtree(out, ignore_errors=True)
            while not (out / "dense").exists():
                process, was_hit = start(ranks, out, limit), False
                while hits < times and wait_for_a_moment(process, out, random.uniform(0, 0.5)):
                    hit(process)
                    hits, was_hit = hits + 1, True
                if process.wait() != 0 and not was_hit:
                    raise SystemExit(f"The run ended with {process.returncode}.")
            steps = steps_logged(out)
            repeated += len(steps) - len(set(steps))
            equal &= same_model(calm, out)
    return hits, repeated, equal


def same_model(a: Path, b: Path) -> bool:
    """Whether two runs have shipped the same model, bit by bit."""
    models = [load_file(next((path / "dense").glob("*.safetensors"))) for path in (a, b)]
    return models[0].keys() == models[1].keys() and all(
        models[0][name].equal(models[1][name]) for name in models[0]
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for one rank; torchrun starts all of them again."""
    victim = random.choice(workers(process))
    try:
        victim.kill()
    except psutil.NoSuchProcess:
        return
    if victim.pid == process.pid:
        process.wait()
    else:
        psutil.wait_procs([victim], timeout=10)


def terminate(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, as clusters send it."""
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)


def kills(ranks: int, settings: Settings) -> Row:
    """SIGKILL at random moments, also during saves."""
    hits, repeated, equal = disturbed_run(ranks, settings.kills, settings.limit, kill)
    name = f"SIGKILL, {ranks} process{'es' if ranks > 1 else ''}"
    return Row(name, hits, hits, round(repeated / hits, 1), 0 if equal else 1)


def stops(ranks: int, settings: Settings) -> Row:
    """SIGTERM: the run saves and ends, and the same command continues."""
    hits, repeated, equal = disturbed_run(ranks, settings.stops, settings.limit, terminate)
    name = f"SIGTERM, {ranks} process{'es' if ranks > 1 else ''}"
    return Row(name, hits, hits, round(repeated / hits, 1), 0 if equal else 1)


def pause(process: subprocess.Popen[bytes]) -> None:
    """One rank lags behind for a second."""
    victim = random.choice(workers(process))
    victim.suspend()
    time.sleep(1)
    victim.resume()


def lags(settings: Settings) -> Row:
    """A rank of two stands still for a second: the other waits."""
    hits, repeated, equal = disturbed_run(2, settings.stops, settings.limit, pause)
    return Row("a rank lags for 1 s", hits, hits, round(repeated / hits, 1), 0 if equal else 1)


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    names = [field.name for field in dataclasses.fields(Row)]
    lines = [[name.replace("_", " ") for name in names], ["---"] * len(names)]
    lines += [[str(getattr(row, name)) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def soak_table(steps: int, held: Sequence[Usage]) -> str:
    """What the process held at two steps, in Markdown."""
    names = [field.replace("_", " ") for field in Usage._fields]
    lines = [["after step", *names], ["---"] * (len(names) + 1)]
    for step, usage in zip((steps // 10, steps), held, strict=True):
        lines.append([f"{step:,}", *map(str, usage)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(settings: Settings) -> None:
    """Break runs and files, and write the table."""
    random.seed(settings.seed)
    rows = []
    for measure in (
        lambda: kills(1, settings),
        lambda: kills(2, settings),
        lambda: stops(1, settings),
        lambda: stops(2, settings),
        lambda: lags(settings),
        lambda: Row("full disk in a save", *fill_disks(settings.steps, settings.seed)),
        lambda: Row("batch or gradients of NaN or inf", *poison(settings.steps, settings.seed)),
        lambda: Row(
            "damaged checkpoint", *corrupt_checkpoints(settings.corruptions, settings.seed)
        ),
        lambda: Row("malformed file", *fuzz_files(settings.files, settings.seed)),
    ):
        rows.append(measure())
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    held = soak(settings.soak)
    text = f"{table(rows)}\n\n{soak_table(settings.soak, held)}\n"
    print(text)
    if settings.out is not None:
        settings.out.write_text(f"{HEADER}\n{text}")
    if any(row.wrong or row.survived < row.times for row in rows):
        sys.exit("Something was lost.")


if __name__ == "__main__":
    main(tyro.cli(Settings))
