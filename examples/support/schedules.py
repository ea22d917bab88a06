"""Learning rates of the downstream recipes, and settings that depend on the head."""

import dataclasses
from collections.abc import Mapping
from typing import Any

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

DETECTION = {"mask-rcnn": {"lr": 2e-4}, "retinanet": {"lr": 1e-4}}
"""By the head, PVT's."""


def with_defaults(settings: Any, defaults: Mapping[str, Any]) -> Any:
    """The settings, with these values for what is None."""
    missing = {name: v for name, v in defaults.items() if getattr(settings, name) is None}
    return dataclasses.replace(settings, **missing)


def warmed_up(optimizer: Optimizer, schedule: LRScheduler, warmup: int, steps: int) -> LRScheduler:
    """A schedule under a linear warm-up from a thousandth, as mmdetection's and mmsegmentation's.

    Args:
        optimizer: whose rates they set.
        schedule: from the first step on.
        warmup: steps; a run of less than ten times as many takes a tenth of its own.
        steps: of the run.
    """
    length = min(warmup, steps // 10)
    if not length:
        return schedule
    return ChainedScheduler([LinearLR(optimizer, 0.001, total_iters=length), schedule], optimizer)
