"""Line 2: step time and memory of ViT-B/16, and the pass over the stacks beside a copy."""

import dataclasses
import gc
import importlib.util
import itertools
import warnings
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

import exfusion_param as exf
from gpu_lines.results import Line, Row, say
from paired_steps import compare
from stack_steps import KINDS, Wrapped
from support.paper import TABLES
from training import Loss, Task, Trainer, new_vit, synchronized_time

OURS = ("step mb", "step mb, AdamW", "forward mb")
CASES = (
    *itertools.product(OURS, (4, 128, 16, 64)),
    ("loop over linears", 4),
    ("MoE-N-1", 8),
    ("loop over linears", 16),
)
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Scale:
    """What is timed: the batch sizes, the model, N, and how it computes."""

    model: str = "vit_base_patch16_224"
    batch_sizes: tuple[int, ...] = (128, 256)
    cases: tuple[tuple[str, int], ...] = CASES
    experts: tuple[int, ...] = (4, 16, 64, 128)
    rounds: int = ROUNDS
    is_fast: bool = True


TOY = Scale("toy", (1,), (("step mb", 2), ("MoE-N-1", 2)), (2,), 1, False)


def run(line: Line) -> None:
    """Measure what has not been measured, until the time is over."""
    scale = TOY if line.is_dry else Scale()
    if importlib.util.find_spec("timm") is None:
        say("steps: timm is not installed; a ViT of torch.nn of the same shape takes its place")
    if line.device == "cuda":
        torch.set_float32_matmul_precision("high")
    compiles = scale.is_fast and line.can_compile()
    first, *others = (
        Task(scale.model, size, bf16=scale.is_fast, compile=compiles) for size in scale.batch_sizes
    )
    _time_steps(line, scale, first)
    _time_passes(line, scale)
    for task in others:
        _time_steps(line, scale, task)


def _time_steps(line: Line, scale: Scale, task: Task) -> None:
    missing = [case for case in scale.cases if _key(task, *case) not in line.results]
    if not missing or not line.has_time():
        return
    dense, loss = Trainer(task), task.new_loss()
    if _key(task, "dense", 1) not in line.results:
        line.results.add(_key(task, "dense", 1), _dense(dense, loss, scale.rounds))
    for kind, num_experts in missing:
        if not line.has_time():
            say(f"steps: the time is over before {_key(task, kind, num_experts)}")
            return
        with line.case(f"steps: {_key(task, kind, num_experts)}"):
            row = _case(dense, loss, kind, num_experts, scale.rounds)
            line.results.add(_key(task, kind, num_experts), row)
            say(f"steps: {_key(task, kind, num_experts)}: {row.get('step by dense')}")


def _key(task: Task, kind: str, num_experts: int) -> str:
    eager = "" if task.compile else ", eager"
    return f"{task.model}, {task.batch_size}, {kind}, {num_experts}{eager}"


def _row(task: Task, kind: str, num_experts: int) -> Row:
    blocks = "compiled" if task.compile else "eager"
    return {"batch": task.batch_size, "blocks": blocks, "kind": kind, "N": num_experts}


def _dense(dense: Trainer, loss: Loss, rounds: int) -> Row:
    seconds = [dense.step(loss) for _ in range(rounds + 2)][2:]
    peak = _peak(dense, loss, 0)
    row = _row(dense.task, "dense", 1) | {"step by dense": 1.0}
    return row | {"step ms": round(1e3 * median(seconds), 1), "peak MiB": peak}


def _case(dense: Trainer, loss: Loss, kind: str, num_experts: int, rounds: int) -> Row:
    """A row; what does not fit into the memory says so."""
    row = _row(dense.task, kind, num_experts)
    _collect()
    resident = _allocated()
    try:
        ours = Trainer(dense.task, kind, num_experts)
        for _ in range(2):
            ours.step(loss)
        peak = _peak(ours, loss, resident)
        found = compare(dense, ours, loss, rounds)
    except torch.OutOfMemoryError:
        return row | {"step by dense": "out of memory"}
    finally:
        torch.compiler.reset()
    spread = f"{found.lowest} to {found.highest}"
    more = {"step by dense": found.step_by_dense, "rounds": spread, "step ms": found.step_ms}
    return row | more | {"peak MiB": peak}


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _peak(trainer: Trainer, loss: Loss, others: int) -> int | None:
    """MiB of a step at most, without what else lies on the GPU; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    trainer.step(loss)
    return round((torch.cuda.max_memory_allocated() - others) / 2**20)


def _time_passes(line: Line, scale: Scale) -> None:
    """An optimizer's step on the stacks, and a copy of as many numbers."""
    for num_experts, kind in itertools.product(scale.experts, ("ExpertAdamW", "AdamW")):
        key = f"pass, {kind}, {num_experts}"
        if key in line.results or not line.has_time():
            continue
        _collect()
        with line.case(f"steps: {key}"):
            try:
                row = _pass(line, scale, kind, num_experts)
            except torch.OutOfMemoryError:
                row = {"pass over ms": "out of memory"}
            line.results.add(key, {"kind": kind, "N": num_experts} | row)


def _pass(line: Line, scale: Scale, kind: str, num_experts: int) -> Row:
    model: nn.Module = new_vit(scale.model).to(line.device)
    exf.wrap(model, num_experts=num_experts, bank_init="uniform", fuse_on="step", seed=0)
    size, make = KINDS[kind]
    step = Wrapped(model, make)
    numbers = num_experts * sum(parameter.numel() for parameter in step.fused)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The experts of .* have gradients")  # and saw no input
        seconds = _seconds(step.step, scale.rounds)
    del model, step
    _collect()
    source = torch.ones(numbers, device=line.device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _seconds(lambda: target.copy_(source), scale.rounds)
    moved = size * numbers / seconds
    return {
        "pass over ms": round(1e3 * seconds, 2),
        "bytes for each number": size,
        "GB/s": round(moved / 1e9),
        "copy GB/s": round(copied / 1e9),
        "share of the copy's": round(moved / copied, 2),
    }


def _seconds(step: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds + 2):
        start = synchronized_time()
        step()
        times.append(synchronized_time() - start)
    return median(times[2:])


def _paper() -> dict[tuple[str, int], str]:
    """By kind and N the paper's time and memory of training, by the dense model's."""
    first, eleventh = TABLES["I"], TABLES["XI"]
    found = {}
    for place, row in {("forward mb", 4): "mb", ("MoE-N-1", 8): "MoE-8-1"}.items():
        hours, memory = (
            first.number(row, column) / first.number("dense", column)
            for column in ("GPU hours", "memory")
        )
        found[place] = f"{hours:.2f}, {memory:.2f} (table I)"
    found["forward mb", 128] = f"{eleventh.rows['N = 128'][0]} (time only, table XI, DeiT-T)"
    return found


def tables(rows: dict[str, Row]) -> list[list[Row]]:
    """Step times beside the paper's, and passes over the stacks."""
    steps = [row for row in rows.values() if "batch" in row]
    paper = _paper()
    dense = {(r["batch"], r["blocks"]): r for r in steps if r["kind"] == "dense"}
    for row in steps:
        peak, beside = row.get("peak MiB"), dense[row["batch"], row["blocks"]].get("peak MiB")
        row["memory by dense"] = round(peak / beside, 2) if peak and beside else None
        row["paper: step, memory by dense"] = paper.get((row["kind"], row["N"]))
    return [steps, [row for row in rows.values() if "batch" not in row]]
