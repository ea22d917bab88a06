"""The optimizer's side of `fuse_on="step"`, see Note [The optimizer-side way] in fused_leaf.py."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .expert_optimizers import ExpertOptimizer
from .fused_leaf import FusedLeaf, leaves_of
from .fusion_weights import FusionWeights
from .one_by_one import takes_one_by_one, update_one_by_one
from .ranks import sum_together
from .shared_displacement import SharedDisplacement


def pull_back(groups: Iterable[FusionWeights], optimizer: Optimizer, takes: bool) -> None:
    """Turn the gradients of the leaves into those of fusion weights, and hide them.

    Args:
        groups: those that the optimizer has a part of.
        optimizer: about to step.
        takes: whether the stacks that it holds take gradients of their own now.
    """
    groups = list(groups)
    _give_gradients(groups)
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    is_retry = any(parameter.grad is not None for parameter in held.values())
    for weights in groups:
        for stack, leaf in leaves_of(weights):
            leaf.hide_gradient(stack, is_retry)
            if takes and id(stack) in held:
                leaf.give_gradient(stack)


def with_pull_back(
    closure: Callable[[], Any], groups: list[FusionWeights], optimizer: Optimizer, takes: bool
) -> Callable[[], Any]:
    """A closure for an optimizer that evaluates it, perhaps several times, within its step."""

    def evaluate() -> Any:
        for weights in groups:  # the optimizer may have moved the stacks
            weights.settle()
        loss = closure()
        pull_back(groups, optimizer, takes)
        return loss

    return evaluate


def updates_apart(optimizer: Optimizer) -> bool:
    """Whether the stacks are updated after the optimizer's own step, by `update_stacks`."""
    return isinstance(optimizer, ExpertOptimizer) or takes_one_by_one(optimizer)


def update_stacks(groups: Iterable[FusionWeights], optimizer: Optimizer) -> None:
    """Update the stacks that the optimizer holds, after its own step."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    leaves = (pair for weights in groups for pair in leaves_of(weights) if id(pair[0]) in held)
    if isinstance(optimizer, ExpertOptimizer):
        optimizer.update_stacks(leaves)
    else:
        update_one_by_one(optimizer, leaves)


def decay_starts(
    groups: Iterable[FusionWeights], held: Collection[int], decay: float | Tensor
) -> None:
    """Decay the starting values of the stacks whose displacement is held, by a share of them."""
    for weights in groups:
        for _, leaf in leaves_of(weights):
            if not isinstance(leaf, SharedDisplacement) or id(leaf.displacement) not in held:
                continue
            if leaf.displacement.grad is not None:  # else the optimizer has left it alone
                leaf.decay_experts(1 - decay)


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
