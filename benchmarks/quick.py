"""The figures that a change is checked against, in about four minutes.

Command: `make bench-quick`. Training steps are timed in turns with those of a dense twin, and
ExpertAdamW in turns with torch's fused AdamW on gradients that are written out for each expert, and
with a copy of as many bytes as the step has to move at least. A ratio is the median over rounds.
"""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import tyro

import exfusion_param as exf
from paired_steps import measure
from stack_steps import Materialised, Wrapped
from tables import markdown_table, write_results
from training import DEVICE, Task, Trainer, new_vit, synchronized_time

STEPS = (
    ("deit_tiny_patch16_224", 32, "step sw", 15),
    ("deit_tiny_patch16_224", 32, "step mb", 15),
    ("deit_tiny_patch16_224", 4, "step mb", 60),
    ("demo", 128, "step mb", 100),
)
"""Model, batch size, kind and rounds; N = 4."""

MOVED = 24
"""Bytes of an update at least, for each number: experts and both states, read and written."""


@dataclasses.dataclass
class Settings:
    """Time a few steps.

    Args:
        model: a ViT of timm, for all lines but the demo's.
        share: of the rounds.
        num_experts: each N of the optimizer's step.
        folder: where the tables go.
    """

    model: str = STEPS[0][0]
    share: float = 1.0
    num_experts: tuple[int, ...] = (4, 16)
    folder: Path = Path(__file__).parent / "results"


@dataclasses.dataclass
class Row:
    """One figure.

    Args:
        figure: what is compared.
        ratio: median over rounds.
        lowest: of the rounds.
        highest: of the rounds.
        milliseconds: of ours, median over rounds.
        beside: the milliseconds of what it is compared with.
    """

    figure: str
    ratio: float
    lowest: float
    highest: float
    milliseconds: float
    beside: float


def row_of(figure: str, ours: list[float], theirs: list[float], *, inverse: bool = False) -> Row:
    """Two lists of seconds, ours by theirs; the inverse is how many times as fast ours is."""
    pairs = zip(ours, theirs, strict=True)
    ratios = [b / a if inverse else a / b for a, b in pairs]
    milliseconds, beside = (round(1e3 * median(times), 1) for times in (ours, theirs))
    low, high = round(min(ratios), 3), round(max(ratios), 3)
    return Row(figure, round(median(ratios), 3), low, high, milliseconds, beside)


def step_rows(settings: Settings) -> list[Row]:
    """Training steps by the dense model's."""
    rows = []
    for name, batch_size, kind, rounds in STEPS:
        model = name if name == "demo" else settings.model
        dense = Trainer(Task(model, batch_size))
        row = measure(dense, kind, 4, max(1, round(settings.share * rounds)))
        figure = f"{model}, batch {batch_size}, {kind}, N = 4: step by the dense one's"
        spread = (row.step_by_dense, row.lowest, row.highest)
        rows.append(Row(figure, *spread, row.step_ms, row.dense_ms))
    return rows


def optimizer_rows(settings: Settings, num_experts: int) -> list[Row]:
    """ExpertAdamW by torch's AdamW, and by a copy of the bytes that it moves at least."""
    torch.manual_seed(0)

    def wrapped() -> torch.nn.Module:
        model = new_vit(settings.model).to(DEVICE)
        return exf.wrap(model, variant="sw", num_experts=num_experts, fuse_on="step", seed=0)

    materialised = Materialised(wrapped())
    numbers = sum(stack.numel() for stack in materialised.stacks)
    source = torch.ones(numbers * MOVED // 8, device=DEVICE)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {
        "ours": Wrapped(wrapped(), exf.ExpertAdamW).step,
        "torch": materialised.step,
        "copy": lambda: target.copy_(source),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(max(1, round(settings.share * 160 / num_experts)) + 2):
        for name, call in calls.items():
            start = synchronized_time()
            call()
            if index >= 2:
                times[name].append(synchronized_time() - start)
    rate = round(source.numel() * 8 / median(times["copy"]) / 1e9, 1)
    text = f"ExpertAdamW, {settings.model}, N = {num_experts}"
    return [
        row_of(f"{text}: times as fast as torch's", times["ours"], times["torch"], inverse=True),
        row_of(f"{text}: share of {rate} GB/s", times["ours"], times["copy"], inverse=True),
    ]


def main(settings: Settings) -> None:
    """Measure, print and write the table."""
    warnings.filterwarnings("ignore", "The experts of .* have gradients")  # and saw no input
    rows = step_rows(settings)
    rows += [row for n in settings.num_experts for row in optimizer_rows(settings, n)]
    note = (
        f"float32, eager, {DEVICE}. The share of the memory's rate is that of a copy of "
        f"{MOVED} bytes for each number of the experts, which an update reads and writes at least. "
        "Command: `make bench-quick`."
    )
    write_results(settings.folder, "quick", "The figures to check a change against", note, rows)
    print(markdown_table(rows))


if __name__ == "__main__":
    main(tyro.cli(Settings))
