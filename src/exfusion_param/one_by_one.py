"""Torch's own optimizers, which get one stack at a time under `fuse_on="step"`.

Their states belong to single parameters, so that a step on one parameter after the other is a step
on all. Only the N-fold gradient of one stack exists at any time, not those of the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn, optim

if TYPE_CHECKING:
    from .fused_leaf import FusedLeaf

# LBFGS works on all parameters together, and Muon and SparseAdam take no stacks.
_KINDS = {
    optim.ASGD,
    optim.Adadelta,
    optim.Adafactor,
    optim.Adagrad,
    optim.Adam,
    optim.AdamW,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Rprop,
    optim.SGD,
}


def takes_one_by_one(optimizer: optim.Optimizer) -> bool:
    """Whether an optimizer may step on one parameter after the other; no subclass is known to."""
    return type(optimizer) in _KINDS


def update_one_by_one(
    optimizer: optim.Optimizer, leaves: Iterable[tuple[nn.Parameter, FusedLeaf]]
) -> None:
    """Have an optimizer step on each stack whose leaf has a hidden gradient.

    Args:
        optimizer: one that `takes_one_by_one`.
        leaves: stacks that it holds, each with its leaf.
    """
    leaf_of = {id(stack): leaf for stack, leaf in leaves}
    step: Any = type(optimizer).step
    groups = optimizer.param_groups
    try:
        for group in groups:
            for stack in group["params"]:
                if id(stack) not in leaf_of or not leaf_of[id(stack)].give_gradient(stack):
                    continue
                optimizer.param_groups = [group | {"params": [stack]}]
                step.__wrapped__(optimizer)  # without torch's hooks, which have brought us here
                stack.grad = None
    finally:
        optimizer.param_groups = groups
