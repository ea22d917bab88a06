"""Whether the ranks of a job have wrapped the same model in the same way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .fusion_weights import FusionWeights
from .ranks import Ranks
from .shards import is_sharded

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def require_agreement(groups: Mapping[FusionWeights, str], ranks: Ranks) -> None:
    """Raise unless all ranks have the same groups, settings, experts and fusion weights.

    Args:
        groups: the fusion weights of a model, each with its FFN group's name.
        ranks: those that train the model together; all of them have to call this.

    Raises:
        ValueError: on every rank, with what differs.
    """
    own = {name: _fingerprint(weights) for weights, name in groups.items()}
    first, *others = ranks.gather(own)
    for rank, other in enumerate(others, start=1):
        for name in dict.fromkeys([*first, *other]):
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"Rank {rank} has not wrapped the model as rank 0 has: {name!r} differs in "
                    f"{_difference(first.get(name), other.get(name))}. Build and wrap the model "
                    "alike on all ranks, with the same seed: torch.manual_seed(...) before both."
                )


def _fingerprint(weights: FusionWeights) -> dict[str, Any]:
    """What ranks can compare without sending tensors."""
    whole = [tensor for tensor in weights.expert_stacks() if _is_whole(tensor)]
    return {
        "its settings": dataclasses.asdict(weights.config),
        "the shapes of its experts": [tuple(stack.shape) for stack in whole],
        "its experts": [_checksum(stack) for stack in whole],
        "its fusion weights": [_checksum(p) for p in weights.parameters() if _is_whole(p)],
    }


def _is_whole(tensor: Tensor) -> bool:
    """Whether ranks hold the same tensor: it is neither a DTensor nor a flat shard of FSDP1."""
    return not is_sharded(tensor) and tensor.ndim > 1


def _checksum(tensor: Tensor) -> int:
    """The sum of a tensor's bits, which is exact; 0 on the meta device."""
    if tensor.is_meta:
        return 0
    integers = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
    return int(integers.sum(dtype=torch.int64))


def _difference(first: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    if first is None or other is None:
        return "being wrapped at all"
    return next(key for key in first if first[key] != other[key])
