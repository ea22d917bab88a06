"""Parts that load another number of experts than they have (resize_math.py).

Routers, and what optimizers remember of experts, are averaged by the same shares. Under
`fuse_on="step"` the experts are among the latter, and keep to the weights that the model has. In
training a router's softmax over another number of experts differs, so under `mb` only the fused
weights are exactly what they were.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from .optimizer_part import OptimizerPart, target_of_state
from .parts import Module
from .resize_math import apply, resize


class ResizedModule(Module):
    """A wrapped model that loads another number of experts than it has."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        names = {id(v): name for name, v in self.module.state_dict(keep_vars=True).items()}
        self._of_experts = {
            group: {names[id(t)]: t for t in (*group.expert_stacks(), *group.own_tensors())}
            for group in groups_of(self.module)
        }

    def room(self, name: str, tensor: Tensor, stored: Tensor) -> Tensor:
        """Room for as many experts as are stored."""
        if any(name in named for named in self._of_experts.values()):
            tensor = _of_stored_count(tensor, stored)
        return super().room(name, tensor, stored)

    def load(self, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Resize what was read, and load it."""
        resized = dict(tensors)
        for group, name in groups_of(self.module).items():
            resized |= self._resized(group, name, tensors)
        super().load(resized, values)

    def _resized(
        self, group: FusionWeights, called: str, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        named, count = self._of_experts[group], group.config.num_experts
        if not named or (old := len(tensors[next(iter(named))])) == count:
            return {}
        if not isinstance(group.config, ExFusionConfig):
            raise CheckpointError(f"The experts of {called!r} are merged by gates, not resized.")
        saved = uniform_weights(old, torch.device("cpu"), torch.float64)
        for name, tensor in named.items():
            if tensor.ndim == 1:  # a bank or learned weights
                saved = full_tensor(tensors[name]).cpu()
        try:
            how = resize(saved, count)
        except ValueError as error:
            message = f"The {old} experts of {called!r} cannot become {count}: {error}."
            raise CheckpointError(message) from error
        stacks, resized = set(group.expert_stacks()), {}
        for name, tensor in named.items():
            if tensor.ndim == 1:
                resized[name] = spread(how.weights.to(local(tensor)), tensor)
            else:
                matrix = how.experts if tensor in stacks else how.shares  # those of a router
                resized[name] = resized_stack(matrix, tensors[name], tensor)
        return resized


class ResizedOptimizer(OptimizerPart):
    """An optimizer of a wrapped model that loads another number of experts than it has."""

    def room(self, name: str, tensor: Tensor, stored: Tensor) -> Tensor:
        """Room for as many experts as are stored."""
        return super().room(name, _of_stored_count(tensor, stored), stored)

    def load(self, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Average what was read, and load it.

        Averages of experts under `fuse_on="step"` fuse to other weights, but what the model's
        weights hold when a step begins is what its experts fuse to.
        """
        ours = self._parameters()
        resized = dict(tensors)
        for name, tensor in tensors.items():
            target = target_of_state(ours[name.rpartition("/")[0]], tensor)
            if (old := len(tensor)) != len(target):
                shares = resize(torch.ones(old), len(target)).shares
                resized[name] = resized_stack(shares, tensor, target).to(tensor.dtype)
        super().load(resized, values)


def _of_stored_count(stack: Tensor, stored: Tensor) -> Tensor:
    """A tensor like a stack, with as many experts as were stored, if nothing else differs."""
    is_alike = stored.ndim == stack.ndim > 0 and stored.shape[1:] == stack.shape[1:]
    is_resized = is_alike and len(stored) != len(stack)
    return room_for_experts(stack, len(stored)) if is_resized else stack


def resized_stack(matrix: Tensor, stack: Tensor, target: Tensor) -> Tensor:
    """A matrix, shape (M, N), times a stack, shape (N, *S), spread over the ranks as `target`."""
    part = apply(matrix, local(with_all_experts(stack)))
    if not is_sharded(target):
        return part
    sharded: Any = with_memory_of(part, with_all_experts(target))
    goal: Any = target
    return sharded.redistribute(placements=goal.placements)
