"""Health checks after each optimizer step: fusion weights must be finite, and of use.

Reading the values would synchronize a GPU, so they are copied to the CPU asynchronously and checked
before the next step. On a CPU they are checked at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..fusion_weights.base import FusionWeights


class _Look(NamedTuple):
    """Values that are being copied to the CPU.

    Args:
        groups: whose numbers these are.
        numbers: of all groups, behind one another.
        sizes: of each group's.
        event: after which they have arrived.
    """

    groups: list[FusionWeights]
    numbers: Tensor
    sizes: list[int]
    event: Any


_under_way: list[_Look] = []


def check_health(groups: Iterable[FusionWeights]) -> None:
    """Look at groups that an optimizer has stepped.

    Raises:
        RuntimeError: fusion weights are not finite; on a GPU those of the step before as well.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return  # a graph that is replayed runs no Python
    looks = [(group, health) for group in groups if (health := group.health()) is not None]
    for device in dict.fromkeys(health.device for _, health in looks):
        here = [(group, health) for group, health in looks if health.device == device]
        numbers = torch.cat([health for _, health in here])
        event = None
        if device.type == "cuda":
            numbers = numbers.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
        sizes = [len(health) for _, health in here]
        _under_way.append(_Look([group for group, _ in here], numbers, sizes, event))
    if all(look.event is None for look in _under_way):
        finish_checks()


def finish_checks() -> None:
    """Look at what has arrived.

    Raises:
        RuntimeError: fusion weights are not finite.
    """
    looks = _under_way[:]
    _under_way.clear()
    for look in looks:
        if look.event is not None:
            look.event.synchronize()
        if not look.numbers.isfinite().all():
            _raise(look)
        for group, health in zip(look.groups, look.numbers.split(look.sizes), strict=True):
            group.warn_of(health)


def _raise(look: _Look) -> None:
    pairs = zip(look.groups, look.numbers.split(look.sizes), strict=True)
    names = [group.group for group, health in pairs if not health.isfinite().all()]
    raise RuntimeError(
        f"The fusion weights of {len(names)} FFN groups ({names[0]!r} first) became NaN or inf at "
        "this step; memory banks were not moved by it. A batch or its gradients were not finite, "
        "and other parameters may be NaN now too. Resume from the last checkpoint."
    )
