"""Notices weights that train while no optimizer that holds them steps.

Experts under `fuse_on="step"`, and memory banks under either setting, move at the step of a
`torch.optim.Optimizer` that holds the weights. Two kinds of training have none:

- Engines whose optimizer holds other tensors, flat or in another dtype, which are copied into the
  weights after its step: DeepSpeed's ZeRO, Megatron's distributed optimizer. They are refused.
- Loops that write to the weights themselves. They are warned of.

Only a forward hook sees both. Until the weights have had a step of their own, it samples one of an
FFN group's tensors in a forward, and compares it in a later one after a backward. Each unchanged
sample doubles the interval, because the comparison synchronizes a GPU. Without a step of
an optimizer, changes are warned of after a while: SAM changes weights once before its first step.
A compiled forward is not checked.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..fusion_weights.base import FusionWeights, live_groups
from ..fusion_weights.zero_gradients import is_transformed
from ..tensors.shards import local

PATIENCE = 12
"""Backwards before a loop without an optimizer is warned of."""
SIZE = 64
"""Numbers in a sample, at least."""

_stepped: weakref.WeakSet[FusionWeights] = weakref.WeakSet()


@dataclasses.dataclass
class _ForeignSteps:
    """Those of optimizers that hold no wrapped parameter.

    Args:
        count: how many there were.
        last: what stepped last.
    """

    count: int = 0
    last: str = ""


_foreign = _ForeignSteps()


def note_step(optimizer: Optimizer, groups: Sequence[FusionWeights]) -> None:
    """An optimizer has stepped on these groups, or on none."""
    if groups:
        _stepped.update(groups)
    else:
        _foreign.count += 1
        _foreign.last = type(optimizer).__name__


class _Sample:
    """A few numbers of a tensor that trains.

    Args:
        group: the FFN group.
        numbers: themselves.
    """

    def __init__(self, group: FusionWeights, numbers: Tensor) -> None:
        self.numbers = numbers
        self.was_loaded = group.was_loaded
        self.foreign_steps = _foreign.count

    def is_comparable(self, other: _Sample) -> bool:
        """Whether a difference says that the tensor has been trained."""
        one, two = self.numbers, other.numbers
        is_alike = (one.shape, one.dtype, one.device) == (two.shape, two.dtype, two.device)
        return is_alike and self.was_loaded == other.was_loaded


class CustomLoopCheck:
    """A hook on the forward of a group's first linear.

    Args:
        fusion_weights: the group's fusion weights.
    """

    def __init__(self, fusion_weights: FusionWeights) -> None:
        self.fusion_weights = fusion_weights
        self._start()

    def _start(self) -> None:
        self._sample: _Sample | None = None
        self._forwards = self._due = self._changes = 0
        self._interval = 1
        self._had_backward = False

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: nothing of what this group has seen."""
        return {"fusion_weights": self.fusion_weights}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __call__(self, linear: nn.Module, args: Any, output: Any) -> None:
        """Compare samples, if that is due."""
        if torch.compiler.is_compiling() or not isinstance(output, Tensor):
            return
        group = self.fusion_weights
        group.follow_ddp()
        if group in _stepped or group.is_in_custom_loop:
            return
        if not (group.training and output.requires_grad) or is_transformed(output):
            return
        self._forwards += 1
        if self._forwards >= self._due and (sample := self._take_sample()) is not None:
            self._look(sample)
        output.register_hook(self._note_backward)

    def _note_backward(self, gradient: Tensor) -> None:
        self._had_backward = True

    @torch.no_grad()
    def _take_sample(self) -> _Sample | None:
        """Of the first tensor that is here: ZeRO's third stage takes them away in between."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        for tensor in (*self.fusion_weights.trained()[:1], *self.fusion_weights.own_tensors()[:1]):
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad and not tensor.is_meta:
                numbers = local(tensor).flatten()
                if len(numbers):
                    sample = numbers[:: max(1, len(numbers) // SIZE)].clone()
                    return _Sample(self.fusion_weights, sample)
        return None

    def _look(self, sample: _Sample) -> None:
        before = self._sample
        if before is None or not before.is_comparable(sample):
            self._changes = 0
        elif not self._had_backward:
            return
        elif torch.equal(before.numbers, sample.numbers):
            self._changes, self._interval = 0, 2 * self._interval
        elif sample.foreign_steps > before.foreign_steps:
            raise _foreign_optimizer(self.fusion_weights)
        else:
            self._changes += 1
        self._sample, self._had_backward = sample, False
        self._due = self._forwards + self._interval
        if self._changes > 1 and self._forwards > PATIENCE:
            self._warn()

    def _warn(self) -> None:
        for other in live_groups():
            if other.config is self.fusion_weights.config:  # of the same wrap()
                other.is_in_custom_loop = True
        group = self.fusion_weights
        need = (
            'Under fuse_on="step" their experts need one to move; otherwise wrap with '
            'fuse_on="forward".'
            if group.fused
            else 'Its memory bank needs one to move; otherwise wrap with variant="sw" or "dw".'
        )
        warnings.warn(
            f"The weights of {group.group!r} have changed over {self._forwards - 1} backwards "
            f"without a step of a torch.optim.Optimizer on them. {need}",
            stacklevel=2,
        )


def _foreign_optimizer(group: FusionWeights) -> RuntimeError:
    what = "experts" if group.fused else "memory bank"
    return RuntimeError(
        f"The weights of {group.group!r} have changed with a step of {_foreign.last}, which holds "
        "other tensors, as under DeepSpeed's ZeRO and Megatron's distributed optimizer: flat or in "
        f"another dtype, and copied into the weights. The {what} of {group.group!r} stood still. "
        "Use FSDP2 (torch.distributed.fsdp.fully_shard) or DDP, and an optimizer of "
        'model.parameters(); or wrap with fuse_on="forward" and variant="sw" or "dw".'
    )
