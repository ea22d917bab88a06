"""Notices weights that train while no optimizer that holds them steps.

Experts under `fuse_on="step"`, and memory banks under either setting, move at the step of a
`torch.optim.Optimizer` that holds the weights. Two kinds of training have none:

- Engines whose optimizer holds other tensors, flat or in another dtype, which are copied into the
  weights after its step: DeepSpeed's ZeRO, Megatron's distributed optimizer. They are refused.
- Loops that write to the weights themselves. They are warned of.

Only a forward hook sees both. Until the weights have had a step of their own, it samples the
tensors of an FFN group in a forward, and compares them in a later one after a backward. Each
unchanged sample doubles the interval, because the comparison synchronizes a GPU. Where no other
optimizer has stepped, changes are warned of after a while only: SAM changes weights once before its
first step. A compiled forward is not checked.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..fusion_weights.base import FusionWeights, live_groups
from ..fusion_weights.variants import StaticWeights
from ..tensors.ranks import is_joining
from ..tensors.readable import is_capturing, is_transformed
from ..tensors.shards import sample

PATIENCE = 12
"""Backwards before a loop without an optimizer is warned of."""
SIZE = 64
"""Numbers of each tensor in a sample, at least."""

_stepped: weakref.WeakSet[FusionWeights] = weakref.WeakSet()

_OWN = ""
_steps: Counter[str] = Counter()
"""How many steps there were in this process, by the names of the optimizers; of all that hold
wrapped parameters under `_OWN`."""


def note_step(optimizer: Optimizer, groups: Sequence[FusionWeights]) -> None:
    """An optimizer has stepped on these groups, or on none."""
    _stepped.update(groups)
    _steps[_OWN if groups else type(optimizer).__name__] += 1


class _Sample:
    """A few numbers of the tensors of a group that train.

    Args:
        group: the FFN group.
    """

    def __init__(self, group: FusionWeights) -> None:
        # Those that are here: ZeRO's third stage takes weights away between their linears.
        parameters = [*group.trained(), *group.parameters()]
        held = [p for p in parameters if isinstance(p, nn.Parameter) and p.requires_grad]
        self.numbers = [sample(parameter, SIZE) for parameter in held if not parameter.is_meta]
        self.was_loaded = group.was_loaded
        self.steps = _steps.copy()

    def equals(self, before: _Sample) -> bool:
        """Whether no tensor that both have has changed."""
        pairs = zip(before.numbers, self.numbers, strict=False)
        return all(
            torch.equal(one, other)
            for one, other in pairs
            if (one.shape, one.device) == (other.shape, other.device)
        )


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
        """The state that a copy includes: nothing that this group has observed."""
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
        if is_joining() and not isinstance(group, StaticWeights):
            raise RuntimeError(
                "Under DistributedDataParallel.join() ranks without data leave the steps, in which "
                f"the ranks reduce what the fusion weights of {group.group!r} need. Give all ranks "
                'as many batches, or wrap with variant="sw".'
            )
        if group in _stepped or group.is_in_custom_loop:
            return
        if not (group.training and output.requires_grad):
            return
        if is_transformed(output) or is_capturing(output):
            return
        self._forwards += 1
        if self._forwards >= self._due:
            self._look()
        output.register_hook(self._note_backward)

    def _note_backward(self, gradient: Tensor) -> None:
        self._had_backward = True

    @torch.no_grad()
    def _look(self) -> None:
        before, now = self._sample, _Sample(self.fusion_weights)
        if before is None or now.was_loaded != before.was_loaded:
            self._changes = 0
        elif not self._had_backward:
            return
        elif now.equals(before):
            self._changes, self._interval = 0, 2 * self._interval
        elif (steps := now.steps - before.steps) and _OWN not in steps:
            # Otherwise what has changed may be an average of a model that has stepped.
            raise _foreign_optimizer(self.fusion_weights, next(iter(steps)))
        else:
            self._changes += 1
        self._sample, self._had_backward = now, False
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


def _foreign_optimizer(group: FusionWeights, optimizer: str) -> RuntimeError:
    what = "experts" if group.fused else "memory bank"
    return RuntimeError(
        f"The weights of {group.group!r} have changed with a step of {optimizer}, which holds "
        "other tensors, as under DeepSpeed's ZeRO and Megatron's distributed optimizer: flat or in "
        f"another dtype, and copied into the weights. The {what} of {group.group!r} stood still. "
        "Use FSDP2 (torch.distributed.fsdp.fully_shard) or DDP, and an optimizer of "
        'model.parameters(); or wrap with fuse_on="forward" and variant="sw" or "dw".'
    )
