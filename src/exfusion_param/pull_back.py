"""The optimizer's side of `fuse_on="step"`, see Note [The optimizer-side way] in fused_leaf.py."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn

from .fused_leaf import FusedLeaf, leaves_of
from .fusion_weights import FusionWeights
from .ranks import sum_together


def pull_back(groups: Iterable[FusionWeights], held: Collection[int]) -> None:
    """Turn the gradients of the leaves into those of stacks and fusion weights.

    Args:
        groups: those that the optimizer has a part of.
        held: the ids of the optimizer's parameters; other stacks wait for their own optimizer.
    """
    groups = list(groups)
    _give_gradients(groups)
    for weights in groups:
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


def _give_gradients(groups: Iterable[FusionWeights]) -> None:
    """Give learned fusion weights and routers their gradient, once for each gradient of the leaves.

    Another optimizer's step may come between; by then the stacks are not those of the forward. Of
    several ranks each has its own tokens, and perhaps a part of stacks and gradients alone: what
    all groups need of the others goes in one all-reduce.
    """
    due = {weights: leaves for weights in groups if (leaves := _with_new_gradients(weights))}
    if not due:
        return
    parts = [
        weights.statistics(torch.stack([leaf.inner_products(s) for s, leaf in leaves]).sum(dim=0))
        for weights, leaves in due.items()
    ]
    ranks = next(iter(due)).ranks
    for weights, sums in zip(due, sum_together(ranks, parts), strict=True):
        weights.take_gradient(sums)
        for _, leaf in due[weights]:
            leaf.note_pull_back()


def _with_new_gradients(weights: FusionWeights) -> list[tuple[nn.Parameter, FusedLeaf]]:
    for stack, leaf in leaves_of(weights):
        leaf.check_before_step(stack)
    leaves = [(stack, leaf) for stack, leaf in leaves_of(weights) if leaf.leaf.grad is not None]
    return [] if all(leaf.was_pulled_back() for _, leaf in leaves) else leaves
