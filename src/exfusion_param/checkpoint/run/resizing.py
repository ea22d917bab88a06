"""Parts that load another number of experts than they have (resize_math.py).

Routers, and what optimizers remember of experts, are averaged by the same shares. Under
`fuse_on="step"` the experts are among the latter, and keep to the weights that the model has. In
training a router's softmax over another number of experts differs, so under `mb` only the fused
weights are exactly what they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...config import ExFusionConfig
from ...fusion.lookup import groups_of
from ...fusion_weights.base import FusionWeights
from ...tensors.expert_starts import uniform_weights
from ...tensors.shards import (
    full_tensor,
    is_sharded,
    local,
    room_for_experts,
    spread,
    with_all_experts,
    with_memory_of,
)
from ..files.errors import CheckpointError
from .fitting import like as room_like
from .fitting import refuse_other_shape
from .optimizer_part import OptimizerPart, room_of_state
from .parts import Module
from .resize_math import apply, resize


class ResizedModule(Module):
    """A wrapped model that loads another number of experts than it has."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        names, groups = self._names(), groups_of(self.module)
        self._of_experts = {
            names[id(tensor)] for group in groups for tensor in _tensors_of_experts(group)
        }

    def room(self, name: str, tensor: Tensor, stored: Tensor) -> Tensor:
        """Room for as many experts as are stored."""
        if name not in self._of_experts:
            return super().room(name, tensor, stored)
        return _room(f"{self.name}: {name}", tensor, stored)

    def load(self, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Resize what was read, and load it."""
        resized = dict(tensors)
        for group, name in groups_of(self.module).items():
            resized |= self._resized(group, name, tensors)
        super().load(resized, values)

    def _resized(
        self, group: FusionWeights, called: str, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        names, count = self._names(), group.config.num_experts
        counted = [names[id(tensor)] for tensor in _tensors_of_experts(group)]
        if not counted or (old := len(tensors[counted[0]])) == count:
            return {}
        if not isinstance(group.config, ExFusionConfig):
            raise CheckpointError(f"The experts of {called!r} are merged by gates, not resized.")
        vector = next(
            (own for own in group.own_tensors() if own.ndim == 1), None
        )  # bank or learned
        saved = (
            uniform_weights(old, torch.device("cpu"), torch.float64)
            if vector is None
            else full_tensor(tensors[names[id(vector)]]).cpu()
        )
        try:
            how = resize(saved, count)
        except ValueError as error:
            message = f"The {old} experts of {called!r} cannot become {count}: {error}."
            raise CheckpointError(message) from error
        resized = {}
        for tensor in _tensors_of_experts(group):
            if tensor is vector:
                resized[names[id(tensor)]] = spread(how.weights.to(local(tensor)), tensor)
                continue
            is_router = any(tensor is own for own in group.own_tensors())
            name, matrix = names[id(tensor)], how.shares if is_router else how.experts
            resized[name] = resized_stack(matrix, tensors[name], tensor)
        return resized

    def _names(self) -> dict[int, str]:
        return {id(v): name for name, v in self.module.state_dict(keep_vars=True).items()}


class ResizedOptimizer(OptimizerPart):
    """An optimizer of a wrapped model that loads another number of experts than it has."""

    def room(self, name: str, tensor: Tensor, stored: Tensor) -> Tensor:
        """Room for as many experts as are stored."""
        return _room(f"{self.name}: {name}", tensor, stored)

    def load(self, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Average what was read, and load it.

        Averages of experts under `fuse_on="step"` fuse to other weights, but what the model's
        weights hold when a step begins is what its experts fuse to.
        """
        ours = self._parameters()
        resized = dict(tensors)
        for name, tensor in tensors.items():
            target = room_of_state(ours[name.rpartition("/")[0]], tensor)
            if (old := len(tensor)) != len(target):
                shares = resize(torch.ones(old), len(target)).shares
                resized[name] = resized_stack(shares, tensor, target)
        super().load(resized, values)


def _room(name: str, tensor: Tensor, stored: Tensor) -> Tensor:
    if not stored.shape or stored.shape[1:] != tuple(tensor.shape[1:]):
        refuse_other_shape(name, tensor, stored)
    room = room_like(tensor, stored)
    return room if tuple(room.shape) == stored.shape else room_for_experts(room, stored.shape[0])


def resized_stack(matrix: Tensor, stack: Tensor, target: Tensor) -> Tensor:
    """A matrix, shape (M, N), times a stack, shape (N, *S), spread over the ranks as `target`."""
    part = apply(matrix, local(with_all_experts(stack))).to(target.dtype)
    if not is_sharded(target):
        return part
    sharded: Any = with_memory_of(part, with_all_experts(target))
    goal: Any = target
    return sharded.redistribute(placements=goal.placements)


def _tensors_of_experts(group: FusionWeights) -> Iterator[Tensor]:
    yield from group.expert_stacks()
    yield from group.own_tensors()
