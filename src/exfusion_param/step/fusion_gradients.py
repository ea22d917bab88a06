"""The gradients of routers and learned fusion weights at an optimizer's step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..expert_sums import products_with
from ..fusion_weights import FusionWeights, LearnedWeights, StaticWeights
from ..ranks import ALONE, Ranks, sum_together
from ..shards import is_sharded, like, local, padded, ranks_of, spread
from .turn import Turn

_SEEN = "_exfusion_seen"
"""The attribute of a gradient that holds the version of it from which others were computed."""


def fusion_gradients(
    turns: Mapping[FusionWeights, Sequence[Turn]],
) -> dict[nn.Parameter, Tensor]:
    """The gradients of routers and learned fusion weights, computed once for each backward.

    Another optimizer's step may come between; by then the experts are not those of the forward.
    """
    by_ranks: dict[Ranks, list[FusionWeights]] = defaultdict(list)
    for weights, own in turns.items():
        if _has_new_gradients(weights, own) and not isinstance(weights, StaticWeights):
            by_ranks[weights.ranks].append(weights)
    for ranks, alike in by_ranks.items():
        parts = [weights.statistics(_products(weights, turns[weights], ranks)) for weights in alike]
        for weights, sums in zip(alike, sum_together(ranks, parts), strict=True):
            weights.step_gradients = {
                parameter: _as_gradient(parameter, gradient)
                for parameter, gradient in weights.gradients(sums).items()
                if parameter.requires_grad
            }
    return {p: grad for weights in turns for p, grad in weights.step_gradients.items()}


def _has_new_gradients(weights: FusionWeights, turns: Sequence[Turn]) -> bool:
    """Whether a backward has written gradients since these were asked for last."""
    there: list[Any] = [grad for turn in turns if (grad := turn.parameter.grad) is not None]
    if not there:
        weights.step_gradients = {}
    is_new = any(getattr(grad, _SEEN, None) != local(grad)._version for grad in there)
    if is_new:
        for gradient in there:
            setattr(gradient, _SEEN, local(gradient)._version)
        for turn in turns:
            turn.fused.note_gradient()
    return is_new


def _products(weights: FusionWeights, turns: Sequence[Turn], ranks: Ranks) -> Tensor:
    """`<E_i, G>` of this rank's share of a group's experts, shape (N,)."""
    total = torch.zeros_like(weights.current_weights())
    for turn in turns:
        if (gradient := turn.parameter.grad) is not None:
            products = products_with(turn.experts, local(gradient)).to(total)
            if ranks is not ALONE:
                own = ranks_of(turn.parameter) or ranks
                products = products / own.replicas
            total += products
    return total


def _as_gradient(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    if is_sharded(parameter):
        return spread(gradient.to(parameter.dtype), parameter)
    return like(parameter, gradient)


def gather_learned(groups: Iterable[FusionWeights]) -> None:
    """Gather the learned fusion weights that FSDP2 has sharded, all in one collective."""
    by_ranks: dict[Ranks, list[LearnedWeights]] = defaultdict(list)
    for weights in groups:
        if isinstance(weights, LearnedWeights):
            ranks = ranks_of(weights.weights)
            weights.gathered = None
            if ranks is not None:
                by_ranks[ranks].append(weights)
    for ranks, alike in by_ranks.items():
        parts = [padded(weights.weights) / ranks.replicas for weights in alike]
        for weights, whole in zip(alike, sum_together(ranks, parts), strict=True):
            weights.gathered = whole
