"""Finds what was written to a fused parameter since the last step.

Note [Writes from outside]
Whatever the parameter holds when a step begins is what its experts fuse to. What was written since
the last step is found by comparison with a copy, so it does not matter how it was written, and is
added to every expert. Where the copy cannot be trusted, because experts or fusion weights were
loaded, the experts are fused for the comparison.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..fusion_weights.base import FusionWeights
from ..tensors.shards import local
from ..tensors.sliced_sums import fuse_into


class Writes:
    """Compares this rank's part of a parameter with its value at the end of the last step.

    Args:
        weights: the group's fusion weights.
    """

    def __init__(self, weights: FusionWeights) -> None:
        self.fused_with: Tensor | None = None
        """The fusion weights that the parameter is fused with now, shape (N,)."""
        self._weights = weights
        self.recorded: Tensor | None = None
        """This rank's part at the end of the last step."""
        self._fused_from: tuple[int, int] | None = None
        self._fusion_weights: list[tuple[int, int]] = []

    def take(self, part: Tensor, stack: Tensor, experts: Tensor, now: Tensor) -> None:
        """Add to the experts what was written to the parameter since the last step.

        Args:
            part: of the parameter, shape (*S).
            stack: the experts, shape (N, *S); a DTensor if the parameter is one.
            experts: this rank's part of them, shape (N, *S).
            now: the group's fusion weights, shape (N,).
        """
        recorded = self.recorded
        is_known = self._fused_from == (id(stack), experts._version)
        if is_known and now.is_cpu:
            assert self.fused_with is not None
            is_known = torch.equal(self.fused_with, now)
        elif is_known:  # a comparison would have to wait for a GPU
            is_known = self._versions() == self._fusion_weights
        if recorded is None or not is_known:  # something was loaded
            self.fused_with = now.clone()
            shift(experts, difference(part, experts, now), now)
            return
        recorded = recorded.to(part.device, part.dtype)
        if not (part.is_cpu and torch.equal(part, recorded)):  # a GPU would have to be waited for
            shift(experts, part.to(now.dtype) - recorded, now)

    def record(self, part: Tensor, stack: Tensor, experts: Tensor, now: Tensor) -> None:
        """Remember what the parameter was fused from, and what it is at the end of a step."""
        value = self.recorded
        if value is None or value.shape != part.shape or value.device != part.device:
            value = self.recorded = torch.empty_like(part)
        value.copy_(part)
        self.fused_with = now
        self._fused_from = (id(stack), experts._version)
        if not now.is_cpu:
            self._fusion_weights = self._versions()

    def _versions(self) -> list[tuple[int, int]]:
        """Which fusion weights these are; a load in place changes a version."""
        return [(id(tensor), local(tensor)._version) for tensor in self._weights.own_tensors()]


def difference(part: Tensor, experts: Tensor, now: Tensor) -> Tensor | None:
    """A parameter less what its experts fuse to, shape (*S); None for nothing."""
    fused = torch.empty_like(part)
    fuse_into(fused, experts, now)
    return None if _is_known_equal(part, fused) else part.to(now.dtype) - fused


def shift(experts: Tensor, difference: Tensor | None, now: Tensor) -> None:
    """Have experts, shape (N, *S), fuse to as much more, shape (*S)."""
    if difference is None:
        return
    total = now.sum()
    total = torch.where(total == 0, 1, total)  # an empty bank: they fuse to it as it fills
    experts.add_(difference / total.to(difference))


def _is_known_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal; False on a GPU, which would have to be waited for."""
    return one.is_meta or (one.device.type == "cpu" and torch.equal(one, other))
