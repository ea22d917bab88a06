"""What line 3 compares: each arm as a method of the examples, and the size of the runs."""

import dataclasses
from typing import Any

import torch

import exfusion_param as exf
from gpu_lines.vit import ViT
from support import methods

ARMS: dict[str, tuple[methods.Name, dict[str, Any]]] = {
    "control": ("control", {}),
    "dense": ("dense", {}),
    "mb": ("exfusion", {}),
    "mb, uniform bank": ("exfusion", {"bank_init": "uniform"}),
    "sw": ("exfusion", {"variant": "sw"}),
    "dw": ("exfusion", {"variant": "dw"}),
    "samples parted, experts averaged": ("partitioned", {}),
    "mb, noise that differs": ("noise", {"bank_init": "uniform"}),
    "MoE-4-1": ("moe", {}),
}
"""In the order of training, so that what is there first says most."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The model, and how it is trained.

    Args:
        size: pixels of an image.
        patch: pixels of a patch.
        dim: features.
        depth: blocks.
        heads: of attention.
        batch_size: images of a step.
        epochs: passes over the training images.
        limit: take no more than this many images.
        seeds: of the runs.
        lr: highest learning rate.
        weight_decay: of AdamW.
        warmup: the share of the steps in which the learning rate grows.
        drop_path: rate of stochastic depth.
        bf16: forward in bfloat16.
        compile: the blocks.
    """

    size: int = 28
    patch: int = 7
    dim: int = 192
    depth: int = 6
    heads: int = 6
    batch_size: int = 512
    epochs: int = 20
    limit: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 1 / 15
    drop_path: float = 0.1
    bf16: bool = True
    compile: bool = True

    def new_model(self) -> ViT:
        """The dense model, random."""
        return ViT(self.size, self.patch, 1, self.dim, self.depth, self.heads, classes=10)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate: linear warm-up, then a cosine to zero."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        done = torch.tensor((step - warm) / max(1, steps - warm))
        return self.lr * 0.5 * (1 + torch.cos(torch.pi * done)).item()


def prepare(arm: str, seed: int, shape: Shape, device: str) -> methods.Method:
    """A new model of an arm, ready for training."""
    torch.manual_seed(seed)
    name, fields = ARMS[arm]
    dense = shape.new_model().to(device)
    return methods.prepare(name, dense, exf.ExFusionConfig(seed=seed, **fields))
