"""The optimizer's side of `fuse_on="step"`, see Note [The optimizer-side way] in fused_leaf.py."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch

from .fused_leaf import leaves_of
from .fusion_weights import FusionWeights


def pull_back(groups: Iterable[FusionWeights], held: Collection[int]) -> None:
    """Turn the gradients of the leaves into those of stacks and fusion weights.

    Args:
        groups: those that the optimizer has a part of.
        held: the ids of the optimizer's parameters; other stacks wait for their own optimizer.
    """
    for weights in groups:
        _give_gradient(weights)
        for stack, leaf in leaves_of(weights):
            leaf.pull_back(stack, id(stack) in held)


def with_pull_back(
    closure: Callable[[], Any], groups: list[FusionWeights], held: Collection[int]
) -> Callable[[], Any]:
    """A closure for an optimizer that evaluates it, perhaps several times, within its step."""

    def evaluate() -> Any:
        for weights in groups:  # the optimizer may have moved the stacks
            weights.settle()
        loss = closure()
        pull_back(groups, held)
        return loss

    return evaluate


def _give_gradient(weights: FusionWeights) -> None:
    """Give learned fusion weights or a router their gradient, once for each gradient of the leaves.

    Another optimizer's step may come between; by then the stacks are not those of the forward.
    """
    leaves = [(stack, leaf) for stack, leaf in leaves_of(weights) if leaf.fused.grad is not None]
    if not leaves or all(leaf.was_pulled_back() for _, leaf in leaves):
        return
    products = [leaf.inner_products(stack) for stack, leaf in leaves]
    weights.take_gradient(torch.stack(products).sum(dim=0))
    for _, leaf in leaves:
        leaf.note_pull_back()
