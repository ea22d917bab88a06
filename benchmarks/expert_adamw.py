"""An optimizer's step on the expert stacks of a ViT: ExpertAdamW, and peers on the same gradients.

Command: `python benchmarks/expert_adamw.py`. Forward and backward are left out: each fused weight
gets a random gradient. All kinds take their turn in each round; a time is the median over rounds,
a ratio the median over rounds of the ratios within one.
"""

import dataclasses
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from torch import nn

import exfusion_param as exf
from stack_steps import KINDS, Materialised, Wrapped
from tables import markdown_table, write_results
from training import DEVICE, new_vit, synchronized_time


@dataclasses.dataclass
class Settings:
    """Time the step.

    Args:
        model: a ViT of timm.
        variant: where the fusion weights come from.
        num_experts: each N to measure.
        rounds: each kind steps once in each, after two rounds that are not timed.
        folder: where the tables go.
    """

    model: str = "deit_tiny_patch16_224"
    variant: str = "mb"
    num_experts: tuple[int, ...] = (4, 16, 64)
    rounds: int = 7
    folder: Path = Path(__file__).parent / "results"


@dataclasses.dataclass
class Row:
    """One kind of step.

    Args:
        num_experts: N.
        kind: the optimizer.
        milliseconds: of a step, with products, update and fusion.
        bytes_per_number: read and written at least, for each number in the stacks.
        gigabytes_per_second: that the step has moved of them.
        materialised_to_this: the time of "materialised" by this one's.
        lowest: of the rounds.
        highest: of the rounds.
    """

    num_experts: int
    kind: str
    milliseconds: float
    bytes_per_number: int
    gigabytes_per_second: float
    materialised_to_this: float
    lowest: float
    highest: float


def measure(settings: Settings, num_experts: int) -> list[Row]:
    """The kinds in turns."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "num_experts": num_experts,
        "variant": settings.variant,
        "bank_init": "uniform",
    }

    def wrapped() -> nn.Module:
        model = new_vit(settings.model).to(DEVICE)
        return exf.wrap(model, fuse_on="step", seed=0, **fields)

    steps: dict[str, Any] = {"materialised": Materialised(wrapped())}
    steps |= {name: Wrapped(wrapped(), make) for name, (_, make) in KINDS.items()}
    numbers = sum(stack.numel() for stack in steps["materialised"].stacks)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(settings.rounds + 2):
        for name, step in steps.items():
            start = synchronized_time()
            step.step()
            if index >= 2:
                times[name].append(synchronized_time() - start)
    return [row_of(num_experts, name, times, numbers) for name in times]


def row_of(num_experts: int, name: str, times: dict[str, list[float]], numbers: int) -> Row:
    """The figures of one kind, for stacks of so many numbers."""
    pairs = zip(times["materialised"], times[name], strict=True)
    ratios = [theirs / ours for theirs, ours in pairs]
    seconds, size = median(times[name]), KINDS[name][0] if name in KINDS else 44
    return Row(
        num_experts,
        name,
        milliseconds=round(1e3 * seconds, 1),
        bytes_per_number=size,
        gigabytes_per_second=round(size * numbers / seconds / 1e9, 1),
        materialised_to_this=round(median(ratios), 2),
        lowest=round(min(ratios), 2),
        highest=round(max(ratios), 2),
    )


def main(settings: Settings) -> None:
    """Measure, print and write the tables."""
    warnings.filterwarnings("ignore", "The experts of .* have gradients")  # and saw no input
    rows = [row for n in settings.num_experts for row in measure(settings, n)]
    note = (
        f"{settings.model}, variant `{settings.variant}`, float32, {DEVICE}: inner products, "
        "update, fusion and the hooks around the step. "
        "Command: `python benchmarks/expert_adamw.py`."
    )
    write_results(settings.folder, "expert_adamw", "A step on the expert stacks", note, rows)
    print(markdown_table(rows))


if __name__ == "__main__":
    main(tyro.cli(Settings))
