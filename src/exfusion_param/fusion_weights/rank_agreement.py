"""Whether the ranks of a job have wrapped the same model in the same way."""

from __future__ import annotations

import dataclasses
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from ..tensors.arrival import await_ranks
from ..tensors.ranks import ALONE, Ranks
from ..tensors.shards import is_sharded, local
from .base import FusionWeights

_SEEDS, _BASES = "seeds", "bases"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_agreed: weakref.WeakSet[FusionWeights] = weakref.WeakSet()


def agree(groups: Iterable[FusionWeights]) -> None:
    """Compare new groups with those of the other ranks, once, at their first step.

    Under `fuse_on="step"` all ranks draw experts as the first of them does.

    Raises:
        RuntimeError: some ranks do not come to the step, or hold parts of flat parameters.
        ValueError: on every rank, if they differ in more than their draws.
    """
    by_ranks: dict[Ranks, list[FusionWeights]] = defaultdict(list)
    for group in groups:
        if group not in _agreed:
            for fused in group.fused:
                fused.refuse_flat()
            by_ranks[group.ranks].append(group)
    for ranks, new in by_ranks.items():
        if ranks is not ALONE:
            await_ranks(ranks, "optimizer step")
            require_agreement({group: group.name for group in new}, ranks)
        _agreed.update(new)


def require_agreement(groups: Mapping[FusionWeights, str], ranks: Ranks) -> None:
    """Raise unless all ranks, which call this together, have wrapped a model alike.

    Raises:
        ValueError: on every rank, with what differs.
    """
    number = distributed.get_rank() if ranks is not ALONE else 0
    described = {name: _fingerprint(group) for group, name in groups.items()}
    (first_number, first), *others = ranks.gather((number, described))
    for number, other in others:
        for name in dict.fromkeys([*first, *other]):
            if what := _difference(first.get(name, {}), other.get(name, {})):
                raise ValueError(
                    f"Rank {number} wrapped the model differently from rank {first_number}: "
                    f"{name!r} differs in {what}. Build and wrap the model alike on all ranks, "
                    "with the same seed: torch.manual_seed(...) before both. Ranks of another "
                    "model, or of another pipeline stage, need a group of their own: "
                    "wrap(..., process_group=group)."
                )
    every = [first, *(other for _, other in others)]
    for group, name in groups.items():
        _share_draws(group, [fingerprints[name] for fingerprints in every], ranks)
    _agreed.update(groups)


def _share_draws(group: FusionWeights, every: Sequence[Mapping[str, Any]], ranks: Ranks) -> None:
    """Draw as the first rank does: by its seeds, and around its bases where they differ.

    Only one rank may have loaded the weights that were wrapped, and others the shape of them.

    Args:
        group: the FFN group.
        every: its fingerprint on each rank.
        ranks: all of them.
    """
    for index, fused in enumerate(group.fused):
        fused.start = dataclasses.replace(fused.start, seed=every[0][_SEEDS][index])
        bases = [fingerprint[_BASES][index] for fingerprint in every]
        if None in bases:
            fused.base = None  # as on ranks that have none: around the weight
        elif fused.base is not None and any(base != bases[0] for base in bases):
            base = fused.base.to(local(fused.parameter).device)
            ranks.broadcast(base)
            fused.base.copy_(base)  # where it was, as draws depend on the device


def _fingerprint(group: FusionWeights) -> dict[str, Any]:
    """A description that ranks can compare without sending tensors."""
    stacks = [stack for stack in group.expert_stacks() if _is_whole(stack)]
    dense = [fused.parameter for fused in group.fused if not is_sharded(fused.parameter)]
    parameters = [parameter for parameter in group.parameters() if _is_whole(parameter)]
    settings = dataclasses.asdict(group.config)
    return {
        "its settings": settings | ({"seed": None} if group.fused else {}),
        "its shapes": [tuple(tensor.shape) for tensor in [*stacks, *dense]],
        "its experts": [_checksum(stack) for stack in stacks],
        "its weights": [_checksum(tensor[None]) for tensor in dense],
        "its fusion weights": [_checksum(parameter) for parameter in parameters],
        _SEEDS: [fused.start.seed for fused in group.fused],
        _BASES: [
            None if fused.base is None else _checksum(fused.base[None]) for fused in group.fused
        ],
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


def _difference(first: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The first thing in which two fingerprints differ, if they do."""
    if not first or not other:
        return "being wrapped at all"
    return next(
        (key for key in first if key not in (_SEEDS, _BASES) and first[key] != other[key]), None
    )
