"""What cheaper ways to hold experts cost in quality: loss curves and accuracy over seeds.

Command: `PYTHONPATH=examples python benchmarks/low_precision.py`. The demo's small ViT trains on
the demo's images under `fuse_on="step"`, all ways side by side on the same batches: states of the
optimizer in bfloat16 or 8 bits, and experts in bfloat16.
"""

import dataclasses
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
import timm
import torch
import tyro
from torch import nn

import exfusion_param as exf
from exfusion_param import plotting
from exfusion_param.history import read_history, write_history
from support.data import load
from support.training import Comparison
from tables import markdown_table, write_results

WRAPPED: dict[str, dict[str, Any]] = {
    "exfusion": {},
    "states in bfloat16": {"state_dtype": torch.bfloat16},
    "states in 8 bits": {"state_dtype": "8bit"},
    "stacks in bfloat16": {"state_dtype": torch.float32, "expert_dtype": torch.bfloat16},
    "stacks and states in bfloat16": {
        "state_dtype": torch.bfloat16,
        "expert_dtype": torch.bfloat16,
    },
}
"""What `ExpertAdamW` is given; "exfusion" holds all in float32."""


@dataclasses.dataclass
class Settings:
    """Train in several ways side by side.

    Args:
        seeds: of weights, experts and batches.
        num_experts: N.
        epochs: passes over the training images.
        runs: folder of checkpoints; the same command continues.
        folder: where the tables go.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    num_experts: int = 4
    epochs: int = 8
    runs: Path = Path("runs/low_precision")
    folder: Path = Path(__file__).parent / "results"


@dataclasses.dataclass
class Row:
    """One way over the seeds.

    Args:
        run: its name.
        accuracy: on the test images, in percent, mean.
        deviation: of the accuracy.
        last_loss: training loss over the last 100 steps, mean.
        loss_deviation: over the seeds.
        worst_gap: by how much a curve of the loss, averaged over 50 steps and the seeds, is above
            the float32 one at most.
    """

    run: str
    accuracy: float
    deviation: float
    last_loss: float
    loss_deviation: float
    worst_gap: float


def build_models(num_experts: int, seed: int) -> dict[str, nn.Module]:
    """A dense model, and wrapped ones with the same experts."""

    def dense() -> nn.Module:
        torch.manual_seed(seed)
        return timm.create_model(
            "vit_tiny_patch16_224",
            img_size=28,
            patch_size=7,
            in_chans=1,
            num_classes=10,
            embed_dim=96,
            depth=6,
            num_heads=3,
        )

    config = exf.ExFusionConfig(fuse_on="step", num_experts=num_experts, seed=seed)
    return {"dense": dense(), **{name: exf.wrap(dense(), config) for name in WRAPPED}}


def train(settings: Settings, seed: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """The loss at each logged step, and the accuracy at the end, for each run."""
    recipe = {"batch_size": 128, "lr": 1e-3, "weight_decay": 0.05, "save_every": 50}
    recipe |= {"epochs": settings.epochs, "seed": seed, "num_experts": settings.num_experts}
    models, out = build_models(settings.num_experts, seed), settings.runs / str(seed)
    out.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(models, load(None, 28), out, recipe, WRAPPED)
    comparison.train()
    write_history(out / "metrics.csv", comparison.rows)
    losses = {name: [row[f"loss/{name}"] for row in comparison.rows] for name in models}
    return losses, {name: comparison.last_accuracy(name) for name in models}


def smooth(curves: list[list[float]]) -> torch.Tensor:
    """A mean curve over seeds and five logged steps."""
    over_seeds = torch.tensor(curves).mean(dim=0)
    return over_seeds.unfold(0, 5, 1).mean(dim=1)


def plot(settings: Settings) -> None:
    """Loss curves of the first seed."""
    history = read_history(settings.runs / str(settings.seeds[0]) / "metrics.csv")
    histories = {
        name: {"step": history["step"], "loss": history[f"loss/{name}"]}
        for name in ("dense", *WRAPPED)
    }
    plotting.curves(histories, "loss").set_ylabel("training loss")
    plt.savefig(settings.folder / "low_precision.svg")
    plt.close()


def main(settings: Settings) -> None:
    """Train, print and write the tables."""
    results = [train(settings, seed) for seed in settings.seeds]
    rows = []
    for name in results[0][0]:
        curves = [losses[name] for losses, _ in results]
        accuracies = [accuracy[name] for _, accuracy in results]
        last = [mean(curve[-10:]) for curve in curves]
        gap = smooth(curves) - smooth([losses["exfusion"] for losses, _ in results])
        rows.append(
            Row(
                name,
                accuracy=round(mean(accuracies), 2),
                deviation=round(stdev(accuracies), 2),
                last_loss=round(mean(last), 4),
                loss_deviation=round(stdev(last), 4),
                worst_gap=round(gap.max().item(), 4),
            )
        )
    note = (
        f"The demo's model and images, N = {settings.num_experts}, mb, {settings.epochs} epochs, "
        f"seeds {settings.seeds}. "
        "Command: `PYTHONPATH=examples python benchmarks/low_precision.py`."
    )
    write_results(settings.folder, "low_precision", "Experts held in less", note, rows)
    plot(settings)
    print(markdown_table(rows))


if __name__ == "__main__":
    main(tyro.cli(Settings))
