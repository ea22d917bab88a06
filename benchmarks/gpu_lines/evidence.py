"""Line 3: ExFusion beside its controls on Fashion-MNIST, several runs on the GPU at once."""

import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch

from gpu_lines import alone
from gpu_lines.arms import ARMS, Shape
from gpu_lines.batches import Batches, Images, accuracy
from gpu_lines.results import Line, Row, say
from gpu_lines.stacked import Stacked
from support.paper import TABLES

TOY = Shape(
    patch=14, dim=16, depth=1, heads=2, batch_size=32, epochs=2, limit=96, seeds=(0, 1),
    bf16=False, compile=False,
)  # fmt: skip
WAYS = "stacked", "processes"
TIMED = "mb"  # the arm by which the faster way is found
CONTROL = "control"
PATIENCE = 60.0  # seconds in which all processes have to be ready
START = "spawn"  # how processes start; a fork would share CUDA's state


def run(line: Line) -> None:
    """Train what is missing, arm by arm, until the time is over."""
    shape = TOY if line.is_dry else Shape()
    if shape.compile and line.device == "cuda":
        shape = dataclasses.replace(shape, compile=line.can_compile())
    images = Images.load(line.data, shape, line.device)
    if line.device == "cuda":
        torch.set_float32_matmul_precision("high")
    _remember_settings(line, shape, images)
    context = multiprocessing.get_context(START)
    with ProcessPoolExecutor(len(shape.seeds), context) as pool:  # starts none before its use
        way = _faster_way(line, shape, images, pool)
        for arm in ARMS:
            _train_arm(line, shape, images, arm, None if way == "stacked" else pool)


def _remember_settings(line: Line, shape: Shape, images: Images) -> None:
    """Write down how the runs are made.

    Raises:
        SystemExit: --out holds runs that were made in another way.
    """
    fields = [f"{name} {value}" for name, value in dataclasses.asdict(shape).items()]
    runs = ", ".join([f"{len(images.train):,} images", f"{len(images.test):,} to test on", *fields])
    if "runs" not in line.results:
        line.results.add("runs", {"runs": runs})
    elif line.results.rows["runs"]["runs"] != runs:
        raise SystemExit(f"{line.results.path} holds other runs. Take another --out for: {runs}.")


def _train_arm(
    line: Line, shape: Shape, images: Images, arm: str, pool: ProcessPoolExecutor | None
) -> None:
    """The seeds of an arm that are missing, stacked or in processes."""
    seeds = tuple(seed for seed in shape.seeds if _key(arm, seed) not in line.results)
    if not seeds:
        return
    if not line.has_time():
        say(f"evidence: no time for {arm}; the same command continues")
        return
    with line.case(f"evidence: {arm}"):
        if pool is None:
            _train_stacked(line, shape, images, arm, seeds)
        else:
            _train_processes(line, shape, pool, arm, seeds)


def _key(arm: str, seed: int) -> str:
    return f"{arm}, seed {seed}"


def _faster_way(line: Line, shape: Shape, images: Images, pool: ProcessPoolExecutor) -> str:
    """Measured once: milliseconds of a step of all seeds at once, for each of them."""
    steps = 3 if line.is_dry else 30
    ways: dict[str, Callable[[], float]] = {
        "stacked": partial(_stacked_seconds, line, shape, images, steps),
        "processes": partial(_processes_seconds, line, shape, pool, steps),
    }
    for way, measured in ways.items():
        if f"way: {way}" not in line.results:
            with line.case(f"evidence: {way}"):
                ms = round(1e3 * measured() / len(shape.seeds), 3)
                line.results.add(f"way: {way}", {"way": way, "ms of a step and run": ms})
                say(f"evidence: {way}: {ms} ms for a step of one of {len(shape.seeds)} runs")
    rows = {way: line.results.rows.get(f"way: {way}", {}) for way in WAYS}
    found = {way: row["ms of a step and run"] for way, row in rows.items() if row}
    return min(found, key=found.__getitem__, default=WAYS[0])


def _stacked_seconds(line: Line, shape: Shape, images: Images, steps: int) -> float:
    model = Stacked(TIMED, shape.seeds, shape, line.device)
    batches = Batches(images, shape, shape.seeds)
    for step in range(2 * steps):
        if step == steps:
            started = alone.now(line.device)
        model.step(batches.batch(step % batches.steps), shape.lr)
    return (alone.now(line.device) - started) / steps


def _processes_seconds(line: Line, shape: Shape, pool: ProcessPoolExecutor, steps: int) -> float:
    """The slowest of as many processes as there are seeds, which all run at once."""
    with multiprocessing.get_context(START).Manager() as manager:
        ready = manager.Barrier(len(shape.seeds), timeout=PATIENCE)
        timed = partial(alone.timed_steps, TIMED, shape, line.device, line.data, steps, ready)
        return max(pool.map(timed, shape.seeds))


def _train_stacked(
    line: Line, shape: Shape, images: Images, arm: str, seeds: tuple[int, ...]
) -> None:
    model, batches = Stacked(arm, seeds, shape, line.device), Batches(images, shape, seeds)
    started, losses = alone.now(line.device), torch.zeros(len(seeds))
    for step in range(batches.steps):
        if time.time() > line.until:
            say(f"evidence: the time is over at step {step} of {batches.steps} of {arm}")
            return
        losses = model.step(batches.batch(step), shape.rate(step, batches.steps))
    seconds = (alone.now(line.device) - started) / len(seeds)
    for seed, shipped, loss in zip(seeds, model.shipped(), losses.tolist(), strict=True):
        row = {"accuracy": accuracy(shipped, images), "loss": loss, "seconds": seconds}
        _remember(line, arm, seed, row)


def _train_processes(
    line: Line, shape: Shape, pool: ProcessPoolExecutor, arm: str, seeds: tuple[int, ...]
) -> None:
    trained = partial(alone.train, arm, shape, line.device, line.data, line.until)
    for seed, row in zip(seeds, pool.map(trained, seeds), strict=True):
        if row is not None:
            _remember(line, arm, seed, row)


def _remember(line: Line, arm: str, seed: int, row: Row) -> None:
    line.results.add(_key(arm, seed), {"arm": arm, "seed": seed} | row)
    say(f"evidence: {arm}, seed {seed}: {row['accuracy']:.2f} %")


def tables(rows: dict[str, Row]) -> list[list[Row]]:
    """Accuracies over the seeds that an arm and the control have, and which way was faster."""
    found: dict[str, dict[int, float]] = {}
    for row in rows.values():
        if "arm" in row:
            found.setdefault(row["arm"], {})[row["seed"]] = row["accuracy"]
    paper = TABLES["VI"].column("top-1")
    control = found.get(CONTROL, {})
    table = []
    for arm, values in found.items():
        gains = [values[seed] - control[seed] for seed in values if seed in control]
        row = {"arm": arm, "seeds": len(values)}
        row["test accuracy, %"] = _spread(list(values.values()))
        row["minus control"] = _spread(gains, "+", len(gains) ** 0.5) if arm != CONTROL else None
        table.append(row | {"paper, DeiT-T on ImageNet-1k": paper.get(arm)})
    return [table, *([row for row in rows.values() if key in row] for key in ("way", "runs"))]


def _spread(values: list[float], sign: str = "", divide: float = 1.0) -> str | None:
    """The mean and the standard deviation, or the error of the mean by dividing that."""
    if not values:
        return None
    deviation = f" ± {statistics.stdev(values) / divide:.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.2f}{deviation}"
