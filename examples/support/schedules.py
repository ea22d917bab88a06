"""Learning rates of the downstream recipes, and settings that depend on the head."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, LRScheduler

SEGMENTATION: dict[str, dict[str, Any]] = {
    "fpn": {
        "steps": 40_000,
        "batch_size": 32,
        "lr": 2e-4,
        "weight_decay": 1e-4,
        "warmup_steps": 0,
    },
    "upernet": {
        "steps": 80_000,
        "batch_size": 16,
        "lr": 6e-5,
        "weight_decay": 0.01,
        "warmup_steps": 1500,
    },
}
"""By the head: PVT's for Semantic FPN, mmsegmentation's DeiT in UperNet."""

POWERS = {"fpn": 0.9, "upernet": 1.0}
"""Of the polynomial by which the learning rate falls."""

UPERNET_WARMUP_START = 1e-6
"""The share of the learning rate that the warm-up starts from."""

NOT_DECAYED = {"fpn": (), "upernet": ("norm", "pos_embed", "position_embeddings", "cls_token")}
"""By the head, parts of the names of parameters that its source does not decay."""

RATES = {"mask-rcnn": 2e-4, "retinanet": 1e-4}
IMAGES = 117_266  # of COCO's train2017 that show an object
EPOCHS = 12


def detection(head: str, backbone: str) -> dict[str, Any]:
    """PVT's settings for a detector, for 12 epochs of COCO.

    Args:
        head: mask-rcnn or retinanet.
        backbone: of examples/imagenet.py; the largest PVT learns from half the images at once.
    """
    is_large = backbone == "pvt_large"
    batch_size = 8 if is_large else 16
    steps = EPOCHS * -(-IMAGES // batch_size)
    return {
        "lr": RATES[head] / (1.4 if is_large else 1),
        "batch_size": batch_size,
        "steps": steps,
        "evaluate_every": steps // EPOCHS,
    }


def decayed(model: nn.Module, head: str, weight_decay: float) -> list[dict[str, Any]]:
    """The groups of an optimizer: what the head's source decays, and what it does not."""
    groups: tuple[list[nn.Parameter], ...] = ([], [])
    for name, parameter in model.named_parameters():
        groups[any(part in name for part in NOT_DECAYED[head])].append(parameter)
    decays = (weight_decay, 0.0)
    return [{"params": p, "weight_decay": d} for p, d in zip(groups, decays, strict=True) if p]


def with_defaults(settings: Any, defaults: Mapping[str, Any]) -> Any:
    """The settings, with these values for what is None."""
    missing = {name: v for name, v in defaults.items() if getattr(settings, name) is None}
    return dataclasses.replace(settings, **missing)


def warmed_up(
    optimizer: Optimizer, schedule: LRScheduler, warmup: int, steps: int, start: float = 0.001
) -> LRScheduler:
    """A schedule under a linear warm-up, as mmdetection's and mmsegmentation's.

    Args:
        optimizer: whose rates they set.
        schedule: from the first step on.
        warmup: steps; a run of less than ten times as many takes a tenth of its own.
        steps: of the run.
        start: the share of the learning rate that the warm-up starts from.
    """
    length = min(warmup, steps // 10)
    if not length:
        return schedule
    return ChainedScheduler([LinearLR(optimizer, start, total_iters=length), schedule], optimizer)
