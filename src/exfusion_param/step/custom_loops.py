"""Warns where a loop trains weights without a `torch.optim.Optimizer`, so that no expert moves.

Only a forward hook runs in such a loop. Until an optimizer's first step, it samples the weights and
biases of its FFN group in every fourth backward, and warns when two samples in a row differ from
the ones before. Gradient accumulation changes no sample, and SAM changes one before its first step.
Each unchanged sample doubles the interval, because the comparison synchronizes a GPU. A compiled
forward is not checked.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..fusion_weights.base import FusionWeights, live_groups
from ..fusion_weights.zero_gradients import is_transformed
from ..tensors.shards import local

PERIOD = 4
"""Backwards between the first samples."""
SIZE = 64
"""Numbers of each weight or bias in a sample, at least."""


class CustomLoopCheck:
    """A hook on the forward of a group's first linear.

    Args:
        fusion_weights: the group's fusion weights.
    """

    def __init__(self, fusion_weights: FusionWeights) -> None:
        self.fusion_weights = fusion_weights
        self._changes = 0
        self._forwards = 0
        self._period = PERIOD
        self._sample: list[Tensor] = []

    def __call__(self, linear: nn.Module, args: Any, output: Any) -> None:
        """Take a sample in this forward's backward, if one is due."""
        if torch.compiler.is_compiling() or not isinstance(output, Tensor):
            return
        group, fused = self.fusion_weights, self.fusion_weights.fused[0]
        group.follow_ddp()
        if fused.has_stepped() or group.was_loaded or group.is_in_custom_loop:
            return
        if not (group.training and output.requires_grad and fused.parameter.requires_grad):
            return
        self._forwards += 1
        if self._forwards % self._period == 0 and not is_transformed(output):
            output.register_hook(self._take_sample)

    @torch.no_grad()
    def _take_sample(self, gradient: Tensor) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        every = [local(fused.parameter).flatten() for fused in self.fusion_weights.fused]
        now = [numbers[:: max(1, len(numbers) // SIZE)].clone() for numbers in every]
        before, self._sample = self._sample, now
        if not before or self.fusion_weights.is_in_custom_loop:
            return
        pairs = zip(before, now, strict=True)
        if all(one.device == other.device and torch.equal(one, other) for one, other in pairs):
            self._changes, self._period = 0, 2 * self._period
            return
        self._changes += 1
        if self._changes == 2:
            self._warn()

    def _warn(self) -> None:
        for other in live_groups():
            if other.config is self.fusion_weights.config:  # of the same wrap()
                other.is_in_custom_loop = True
        warnings.warn(
            f"The weights of {self.fusion_weights.group!r} have changed over {self._forwards} "
            'backwards without a step of a torch.optim.Optimizer on them. Under fuse_on="step" '
            'their experts need one to move; otherwise wrap with fuse_on="forward".',
            stacklevel=2,
        )
