"""Where ExFusion becomes free: step time by the dense model's, over model and batch size.

Command: `python benchmarks/scaling.py`. The experts cost passes over their stacks, whatever the
batch; so their share falls with the tokens of a step.
"""

import dataclasses
import gc
from pathlib import Path

import tyro
from tqdm import tqdm

from paired_steps import Row as StepRow
from paired_steps import measure
from tables import markdown_table, write_csv, write_results
from training import DEVICE, SOURCE, T5, TARGET, Task, Trainer

TASKS = (
    ("deit_tiny_patch16_224", 4, 16),
    ("deit_tiny_patch16_224", 16, 16),
    ("deit_small_patch16_224", 16, 16),
    ("deit_base_patch16_224", 8, 16),
    ("t5-small", 4, 16),
    ("t5-base", 2, 4),
)


@dataclasses.dataclass
class Settings:
    """Time training steps of several models.

    Args:
        tasks: each model of timm or T5 with its batch size, and the largest N to train it with.
        kinds: of ExFusion, as in training.py.
        num_experts: each N.
        rounds: that are timed.
        bf16: compute in bfloat16.
        compile: each block.
        name: of the tables.
        folder: where they go.
    """

    tasks: tuple[tuple[str, int, int], ...] = TASKS
    kinds: tuple[str, ...] = ("step mb", "forward mb")
    num_experts: tuple[int, ...] = (4, 16)
    rounds: int = 3
    bf16: bool = False
    compile: bool = False
    name: str = "scaling"
    folder: Path = Path(__file__).parent / "results"


@dataclasses.dataclass
class Row(StepRow):
    """One kind of one model, with the tokens of a step."""

    model: str
    batch_size: int
    tokens: int


def tokens_of(task: Task) -> int:
    """Of a step, in the encoder and the decoder."""
    return task.batch_size * (SOURCE + TARGET if task.model in T5 else 197)


def main(settings: Settings) -> None:
    """Measure all, and write the tables as they grow."""
    rows: list[Row] = []
    for model, batch_size, most in tqdm(settings.tasks):
        task = Task(model, batch_size, settings.bf16, settings.compile)
        dense = Trainer(task)
        for kind in settings.kinds:
            for num_experts in (n for n in settings.num_experts if n <= most):
                row = measure(dense, kind, num_experts, settings.rounds)
                rows.append(
                    Row(**vars(row), model=model, batch_size=batch_size, tokens=tokens_of(task))
                )
                gc.collect()
        write_csv(settings.folder / f"{settings.name}.csv", rows)
    note = (
        f"{'bfloat16' if settings.bf16 else 'float32'}, "
        f"{'compiled' if settings.compile else 'eager'}, {DEVICE}, {settings.rounds} rounds. "
        "Command: `python benchmarks/scaling.py`, with the settings of these."
    )
    title = "Step time by the dense model's, over model and batch size"
    write_results(settings.folder, settings.name, title, note, rows)
    print(markdown_table(rows))


if __name__ == "__main__":
    main(tyro.cli(Settings))
