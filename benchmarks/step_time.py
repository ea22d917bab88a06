"""The time of a training step by the dense model's: ExFusion for many N, and its peers.

Commands: `make bench`, or `python benchmarks/step_time.py --help` for other models, numbers of
experts and a GPU. Each kind trains in turns with a dense twin; a ratio is the median over rounds of
its step's time by that of the dense step just before.
"""

import dataclasses
import gc
import itertools
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import tyro
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, ScalarFormatter
from tqdm import tqdm

from paired_steps import Row, measure
from peers import PEERS
from tables import markdown_table, write_csv, write_results
from training import DEVICE, KINDS, Task, Trainer


@dataclasses.dataclass
class Settings:
    """Time training steps.

    Args:
        model: a ViT of timm, or a T5 without peers.
        batch_size: samples of a step.
        kinds: of ExFusion.
        num_experts: each N for these kinds.
        peers: other FFNs; "none" for none.
        peer_experts: each N for the peers.
        rounds: that are timed.
        bf16: compute in bfloat16.
        compile: each block.
        name: of the tables.
        folder: where they go.
    """

    model: str = "deit_tiny_patch16_224"
    batch_size: int = 32
    kinds: tuple[str, ...] = tuple(KINDS)
    num_experts: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128)
    peers: tuple[str, ...] = tuple(PEERS)
    peer_experts: tuple[int, ...] = (4, 8)
    rounds: int = 5
    bf16: bool = False
    compile: bool = False
    name: str = "step_time"
    folder: Path = Path(__file__).parent / "results"


def cases(settings: Settings) -> Iterator[tuple[str, int]]:
    """Each kind and N."""
    yield from itertools.product(settings.kinds, settings.num_experts)
    if settings.peers != ("none",):
        yield from itertools.product(settings.peers, settings.peer_experts)


def plot(rows: list[Row], file: Path) -> None:
    """ExFusion over N, and beside it the peers at their largest N."""
    peers = [row for row in rows if row.kind in PEERS]
    figure, axes = plt.subplots(
        1, 2 if peers else 1, figsize=(11 if peers else 6, 4), squeeze=False
    )
    plot_over_experts(axes[0][0], [row for row in rows if row.kind not in PEERS])
    if peers:
        num_experts = max(row.num_experts for row in peers)
        plot_bars(axes[0][1], [row for row in rows if row.num_experts == num_experts], num_experts)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def spread_of(rows: list[Row]) -> list[list[float]]:
    """How far the lowest and the highest round are from the median."""
    below = [row.step_by_dense - row.lowest for row in rows]
    return [below, [row.highest - row.step_by_dense for row in rows]]


def plot_over_experts(ax: Axes, rows: list[Row]) -> None:
    """A curve for each kind; the bars are the spread of the rounds."""
    for kind in dict.fromkeys(row.kind for row in rows):
        of_kind = [row for row in rows if row.kind == kind]
        experts = [row.num_experts for row in of_kind]
        ratios = [row.step_by_dense for row in of_kind]
        ax.errorbar(experts, ratios, spread_of(of_kind), marker="o", markersize=3, label=kind)
    ax.axhline(1, color="gray", linewidth=0.8)
    ax.set(xscale="log", xlabel="experts N", ylabel="step time, dense = 1")
    ax.set_xticks(sorted({row.num_experts for row in rows}))
    ax.get_xaxis().set_major_formatter(ScalarFormatter())
    ax.get_xaxis().set_minor_formatter(NullFormatter())
    ax.legend(fontsize=8)


def plot_bars(ax: Axes, rows: list[Row], num_experts: int) -> None:
    """A bar for each kind, the slowest below."""
    rows = sorted(rows, key=lambda row: row.step_by_dense)
    kinds = [row.kind for row in rows]
    colors = ["tab:gray" if kind in PEERS else "tab:blue" for kind in kinds]
    ratios = [row.step_by_dense for row in rows]
    ax.barh(kinds, ratios, color=colors, xerr=spread_of(rows))
    ax.axvline(1, color="black", linewidth=0.8)
    ax.invert_yaxis()
    ax.set(xlabel=f"step time at N = {num_experts}, dense = 1")


def main(settings: Settings) -> None:
    """Measure all, and write the tables as they grow."""
    task = Task(settings.model, settings.batch_size, settings.bf16, settings.compile)
    dense = Trainer(task)
    rows: list[Row] = []
    for kind, num_experts in tqdm(list(cases(settings))):
        rows.append(measure(dense, kind, num_experts, settings.rounds))
        gc.collect()
        write_csv(settings.folder / f"{settings.name}.csv", rows)
    note = (
        f"{task.model}, batch {task.batch_size}, {'bfloat16' if task.bf16 else 'float32'}, "
        f"{'compiled' if task.compile else 'eager'}, {DEVICE}, {settings.rounds} rounds. "
        "Command: `python benchmarks/step_time.py`, with the settings of these."
    )
    plot(rows, settings.folder / f"{settings.name}.svg")
    write_results(settings.folder, settings.name, "Step time by the dense model's", note, rows)
    print(markdown_table(rows))


if __name__ == "__main__":
    main(tyro.cli(Settings))
