"""Refuses or warns of what is wrong where experts start."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from ..fusion_weights.base import FusionWeights
from .slots import Slot


def refuse_tied(slots: Sequence[Slot]) -> None:
    """Raise if two of the parameters are one, tied after `wrap`."""
    names: dict[int, str] = {}
    for slot in slots:
        name = slot.fused.start.name
        if (other := names.setdefault(id(slot.parameter), name)) != name:
            raise RuntimeError(
                f"{other!r} and {name!r} were tied after wrap(), and one parameter cannot be fused "
                "from two stacks of experts. Tie them before wrap(), which takes one of them."
            )


def warn_of_starts(optimizer: Optimizer, groups: Sequence[FusionWeights]) -> None:
    """Warn if experts have just started around other weights than those that `wrap` made."""
    if _only_makes_states(optimizer):
        return
    changed = [group for group in groups if group.starts_around_changed]
    for group in changed:
        group.starts_around_changed = False
    if loaded := [group for group in changed if group.was_loaded]:
        for group in loaded:
            group.was_loaded = False
        warnings.warn(
            f"The weights of {len(loaded)} FFN groups ({loaded[0].group!r} first) were loaded "
            "without their experts, which are optimizer state. New experts are drawn around the "
            "weights. To continue a run, load the optimizer's state, too.",
            stacklevel=2,
        )
    if empty := [group for group in changed if group.is_empty()]:
        warnings.warn(
            f"The memory bank of {len(empty)} FFN groups ({empty[0].group!r} first) is zero, and "
            "their weights were written after wrap(): this step scales them down to the bank's "
            'mass. Wrap with bank_init="uniform" to start from the weights as they are.',
            stacklevel=2,
        )


def _only_makes_states(optimizer: Optimizer) -> bool:
    """Whether torch's distributed checkpoints make states to load into, by a step of rate zero."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    on_cpu = [rate for rate in rates if not isinstance(rate, Tensor) or rate.device.type == "cpu"]
    return all(rate is not None and float(rate) == 0 for rate in on_cpu) and bool(on_cpu)
