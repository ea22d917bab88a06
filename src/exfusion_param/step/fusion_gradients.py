"""The gradients of routers and learned fusion weights at an optimizer's step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..fusion_weights.base import FusionWeights
from ..fusion_weights.variants import LearnedWeights, StaticWeights
from ..tensors.ranks import ALONE, Ranks, has_ranks, sum_together
from ..tensors.shards import local, padded, ranks_of, replicas_of, spread
from ..tensors.sliced_sums import products_with
from .slots import Slot

_SEEN = "_exfusion_seen"
"""The attribute of a gradient that holds the version of it from which others were computed."""


def fusion_gradients(
    slots: Mapping[FusionWeights, Sequence[Slot]], held: Collection[int]
) -> dict[nn.Parameter, Tensor]:
    """The gradients of routers and learned fusion weights.

    The part of a weight is computed at the step of the optimizer that holds it, with its experts
    and its gradient as that step has them: a GradScaler unscales the gradients of one optimizer at
    a time. Where fusion weights are stepped before, it is computed then.

    Args:
        slots: of the parameters of each FFN group.
        held: ids of the parameters that the optimizer holds.
    """
    by_ranks: dict[Ranks, list[FusionWeights]] = defaultdict(list)
    is_one_process = not has_ranks()
    for group, of_group in slots.items():
        needs_all = not set(map(id, group.own_tensors())).isdisjoint(held)
        is_static = isinstance(group, StaticWeights)
        ranks = ALONE if is_static or is_one_process else group.ranks
        if _take_gradients(of_group, needs_all, ranks) and not is_static:
            by_ranks[ranks].append(group)
    for ranks, alike in by_ranks.items():
        parts = [group.statistics(_products(group, slots[group])) for group in alike]
        for group, sums in zip(alike, sum_together(ranks, parts), strict=True):
            group.step_gradients.clear()
            for parameter, gradient in group.gradients(sums).items():
                if parameter.requires_grad:
                    gradient = gradient.to(parameter.device, parameter.dtype)
                    group.step_gradients[parameter] = spread(gradient, parameter)
    return {p: grad for group in slots for p, grad in group.step_gradients.items()}


def _take_gradients(slots: Sequence[Slot], needs_all: bool, ranks: Ranks) -> bool:
    """Compute the parts of the weights that are due; whether there are any."""
    is_any, has_gradient = False, False
    for slot in slots:
        gradient: Any = slot.parameter.grad
        if gradient is None:
            slot.fused.products = None
            continue
        has_gradient = True
        part = gradient if type(gradient) is Tensor else local(gradient)
        version = part._version
        is_new = getattr(gradient, _SEEN, None) != version
        if is_new or slot.group_index is not None:
            # Before a bank moves, whichever optimizer steps first.
            slot.fused.note_gradient(gradient)
        if slot.group_index is None and not (needs_all and is_new):
            continue
        setattr(gradient, _SEEN, version)
        is_any = True
        if not isinstance(slot.fused.fusion_weights, StaticWeights):
            products = products_with(slot.experts, part)
            if ranks is not ALONE:
                products = products / replicas_of(slot.parameter, ranks)
            slot.fused.products = products
    if not has_gradient:
        slots[0].fused.fusion_weights.step_gradients.clear()
    return is_any


def _products(group: FusionWeights, slots: Sequence[Slot]) -> Tensor:
    """`<E_i, G>` of this rank's share of a group's experts, shape (N,)."""
    total = torch.zeros_like(group.current_weights())
    for slot in slots:
        if slot.fused.products is not None:
            total += slot.fused.products.to(total)
    return total


def gather_learned(groups: Iterable[FusionWeights]) -> None:
    """Gather the learned fusion weights that FSDP2 has sharded, all in one collective."""
    by_ranks: dict[Ranks, list[LearnedWeights]] = defaultdict(list)
    for group in groups:
        if isinstance(group, LearnedWeights):
            ranks = ranks_of(group.weights)
            if group.gathered is not None:
                group.gathered = None
            if ranks is not None:
                by_ranks[ranks].append(group)
    for ranks, alike in by_ranks.items():
        parts = [padded(group.weights) / replicas_of(group.weights, ranks) for group in alike]
        for group, gathered in zip(alike, sum_together(ranks, parts), strict=True):
            group.gathered = gathered
