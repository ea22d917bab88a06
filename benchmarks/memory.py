"""The peak memory of training, by the dense model's and by what the experts need at least.

Command: `python benchmarks/memory.py`. Each kind trains in a process of its own for some steps. The
peak is that of the GPU's allocator, or on a CPU of the whole process (its resident set). At least
needed are the dense peak, and for each number in the stacks the weight and AdamW's two moments:
what `N x FFN parameters x (weight + optimizer state)` says.
"""

import dataclasses
import itertools
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

from experts import expert_stacks
from tables import markdown_table, write_results
from training import DEVICE, Task, Trainer


@dataclasses.dataclass
class Settings:
    """Measure peaks.

    Args:
        model: a ViT of timm.
        batch_size: images of a step.
        kinds: of ExFusion, as in training.py.
        num_experts: each N.
        bf16: compute in bfloat16.
        name: of the tables.
        folder: where they go.
    """

    model: str = "deit_tiny_patch16_224"
    batch_size: int = 32
    kinds: tuple[str, ...] = ("step mb", "step mb, AdamW", "forward mb")
    num_experts: tuple[int, ...] = (4, 16, 64)
    bf16: bool = False
    name: str = "memory"
    folder: Path = Path(__file__).parent / "results"


@dataclasses.dataclass
class Row:
    """One kind.

    Args:
        kind: of ExFusion, or "dense".
        num_experts: N.
        peak_mib: of memory.
        to_dense: the peak by the dense model's.
        to_minimum: the peak by what the experts need at least.
    """

    kind: str
    num_experts: int
    peak_mib: int
    to_dense: float
    to_minimum: float


def measure_here(settings: Settings, kind: str, num_experts: int) -> tuple[int, int]:
    """Train; the peak, and the bytes of the stacks with their moments."""
    task = Task(settings.model, settings.batch_size, settings.bf16)
    ours, loss = Trainer(task, kind, num_experts), task.new_loss()
    for _ in range(3):
        ours.step(loss)
    stacks = expert_stacks(ours.model)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return peak, 3 * sum(stack.nbytes for stack in stacks)


def measure(settings: Settings) -> list[Row]:
    """All kinds, each in a new process."""
    spawn = multiprocessing.get_context("spawn")
    cases = [("dense", 1), *itertools.product(settings.kinds, settings.num_experts)]
    rows: list[Row] = []
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as one_each:
        for kind, num_experts in tqdm(cases):
            peak, stacks = one_each.submit(measure_here, settings, kind, num_experts).result()
            dense = rows[0].peak_mib * 2**20 if rows else peak
            rows.append(
                Row(
                    kind,
                    num_experts,
                    peak_mib=round(peak / 2**20),
                    to_dense=round(peak / dense, 3),
                    to_minimum=round(peak / (dense + stacks), 3),
                )
            )
    return rows


def main(settings: Settings) -> None:
    """Measure, print and write the tables."""
    rows = measure(settings)
    note = (
        f"{settings.model}, 224 pixels, batch {settings.batch_size}, "
        f"{'bfloat16' if settings.bf16 else 'float32'}, AdamW, {DEVICE}. "
        "Command: `python benchmarks/memory.py`, with the settings of these."
    )
    write_results(settings.folder, settings.name, "Peak memory", note, rows)
    print(markdown_table(rows))


if __name__ == "__main__":
    main(tyro.cli(Settings))
