"""ExpertAdamW beside the same update as kernels that torch.compile generates for each shape.

Command: `python benchmarks/compiled_update.py`. The generated update reads and writes experts and
states and takes their weighted sum; both step in turns. A ratio is the median over rounds.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import tyro
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_param.fusion.lookup import groups_of
from experts import expert_stacks
from stack_steps import Wrapped
from tables import markdown_table, write_results
from training import DEVICE, new_vit, synchronized_time

LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01


@dataclasses.dataclass
class Settings:
    """Time the update.

    Args:
        model: a ViT of timm.
        num_experts: each N to measure.
        rounds: that are timed, after two that are not.
        folder: where the table goes.
    """

    model: str = "deit_tiny_patch16_224"
    num_experts: tuple[int, ...] = (4, 16)
    rounds: int = 15
    folder: Path = Path(__file__).parent / "results"


@dataclasses.dataclass
class Row:
    """One N.

    Args:
        num_experts: N.
        expert_adamw_ms: median over rounds.
        compiled_ms: median over rounds.
        compiled_times_as_fast: median over rounds.
        lowest: of the rounds.
        highest: of the rounds.
        largest_difference: between the fused weights of both after the last round.
    """

    num_experts: int
    expert_adamw_ms: float
    compiled_ms: float
    compiled_times_as_fast: float
    lowest: float
    highest: float
    largest_difference: float


def update(
    experts: Tensor, first: Tensor, second: Tensor, gradient: Tensor, w: Tensor, step: Tensor
) -> Tensor:
    """AdamW on a stack and its states, each of shape (N, D), in place; the fused tensor, (D,)."""
    given = w.unsqueeze(1) * gradient
    first.lerp_(given, 1 - BETAS[0])
    second.lerp_(given * given, 1 - BETAS[1])
    rate = LR / (1 - BETAS[0] ** step)
    scale = (1 - BETAS[1] ** step).sqrt()
    experts.mul_(1 - LR * DECAY).sub_(rate * first / (second.sqrt() / scale + EPS))
    return (w.unsqueeze(1) * experts).sum(dim=0)


class Compiled:
    """The stacks of a wrapped model, and the generated update of them."""

    def __init__(self, model: nn.Module, gradients: list[Tensor]) -> None:
        self.w = next(iter(groups_of(model))).current_weights()
        self.stacks = [stack.flatten(1).clone() for stack in expert_stacks(model)]
        self.states = [[torch.zeros_like(s), torch.zeros_like(s)] for s in self.stacks]
        self.gradients = [gradient.flatten() for gradient in gradients]
        self.fused = [torch.empty_like(gradient) for gradient in self.gradients]
        self.count = torch.zeros((), device=DEVICE)
        self.update: Callable[..., Tensor] = torch.compile(update, dynamic=False)

    @torch.no_grad()
    def step(self) -> None:
        """Update and fuse all stacks."""
        self.count += 1
        parts = zip(self.stacks, self.states, self.gradients, self.fused, strict=True)
        for stack, states, gradient, fused in parts:
            fused.copy_(self.update(stack, *states, gradient, self.w, self.count))


def measure(settings: Settings, num_experts: int) -> Row:
    """Both in turns."""
    torch.manual_seed(0)
    model = new_vit(settings.model).to(DEVICE)
    exf.wrap(model, variant="sw", num_experts=num_experts, fuse_on="step", seed=0)
    ours = Wrapped(model, exf.ExpertAdamW)
    compiled = Compiled(model, ours.gradients)
    times: list[tuple[float, float]] = []
    for _ in range(settings.rounds + 2):
        start = synchronized_time()
        ours.step()
        middle = synchronized_time()
        compiled.step()
        times.append((middle - start, synchronized_time() - middle))
    own, theirs = zip(*times[2:], strict=True)
    ratios = [a / b for a, b in times[2:]]
    pairs = zip(ours.fused, compiled.fused, strict=True)
    return Row(
        num_experts,
        round(1e3 * median(own), 1),
        round(1e3 * median(theirs), 1),
        round(median(ratios), 2),
        round(min(ratios), 2),
        round(max(ratios), 2),
        max((a.flatten() - b).abs().max().item() for a, b in pairs),
    )


def main(settings: Settings) -> None:
    """Measure, print and write the table."""
    rows = [measure(settings, n) for n in settings.num_experts]
    note = (
        f"{settings.model}, variant `sw`, float32, {DEVICE}; torch.compile without dynamic shapes. "
        "Command: `python benchmarks/compiled_update.py`."
    )
    write_results(settings.folder, "compiled_update", "A generated update of stacks", note, rows)
    print(markdown_table(rows))


if __name__ == "__main__":
    main(tyro.cli(Settings))
