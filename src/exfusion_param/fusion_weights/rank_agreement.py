"""Whether the ranks of a job have wrapped the same model in the same way."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..tensors.ranks import ALONE, Ranks
from ..tensors.shards import is_sharded
from .base import FusionWeights

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_agreed: weakref.WeakSet[FusionWeights] = weakref.WeakSet()


def agree(groups: Iterable[FusionWeights]) -> None:
    """Compare new groups with those of the other ranks, once, at their first step.

    Under `fuse_on="step"` all ranks draw experts as the first of them does.

    Raises:
        ValueError: on every rank, if they differ in more than their draws.
    """
    new = [weights for weights in groups if weights not in _agreed]
    by_forward = {w: w.group for w in new if not w.fused and w.sharing is None}
    if by_forward and (ranks := next(iter(by_forward)).ranks) is not ALONE:
        require_agreement(by_forward, ranks)
    by_step = [weights for weights in new if weights.fused]
    if by_step and (ranks := by_step[0].ranks) is not ALONE:
        _share_draws(by_step, ranks)
    _agreed.update(new)


def _share_draws(groups: Iterable[FusionWeights], ranks: Ranks) -> None:
    """Take the seeds of the first rank that has a group; where they differed, its bases as well."""
    own = {
        f"{weights.group}.{weights.first_linear}": {
            "settings": dataclasses.asdict(weights.config) | {"seed": None},
            "seeds": [fused.start.seed for fused in weights.fused],
        }
        for weights in groups
    }
    gathered = ranks.gather(own)
    first: dict[str, dict[str, Any]] = {}
    for rank, other in enumerate(gathered):
        for name, description in other.items():
            if first.setdefault(name, description)["settings"] != description["settings"]:
                raise ValueError(
                    f"Rank {rank} wrapped the model differently: {name!r} differs in its settings. "
                    "Wrap the model with the same settings on all ranks."
                )
    for weights in groups:
        name = f"{weights.group}.{weights.first_linear}"
        seeds = first[name]["seeds"]
        is_alike = all(other.get(name, first[name])["seeds"] == seeds for other in gathered)
        for fused, seed in zip(weights.fused, seeds, strict=True):
            fused.start = dataclasses.replace(fused.start, seed=seed)
            if not is_alike and fused.base is not None and not is_sharded(fused.parameter):
                ranks.broadcast(fused.base)


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
                    f"Rank {rank} wrapped the model differently from rank 0: {name!r} differs in "
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
    """A sum of a tensor's bits, which is exact and differs in another order; 0 on meta."""
    if tensor.is_meta:
        return 0
    integers = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
    rows = integers.flatten(2).sum(-1, dtype=torch.int64) if tensor.ndim > 2 else integers.long()
    places = torch.arange(1, rows.numel() + 1, device=rows.device)
    return int((rows.flatten() * places).sum())


def _difference(first: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    if first is None or other is None:
        return "being wrapped at all"
    return next(key for key in first if first[key] != other[key])
