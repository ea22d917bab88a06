"""Checks of an optimizer and an FFN group at their first step together.

Under `fuse_on="forward"` expert stacks are parameters like any other, and rules that others have
for parameters do not fit them: a stacked bias has two dimensions and a name that does not end in
"bias", a stacked weight is a batch of matrices. What would train wrongly is refused, or warned of.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..fusion.handed_out import is_any_handed_out
from ..fusion.lookup import parametrized_names
from ..fusion.outside_access import require_no_writes, require_sound
from ..fusion_weights.base import FusionWeights
from ..fusion_weights.variants import LearnedWeights
from .refusals import refuse_dense_state

_seen: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[FusionWeights]] = (
    weakref.WeakKeyDictionary()
)


def check_first_step(optimizer: Optimizer, groups: Iterable[FusionWeights]) -> None:
    """Check an optimizer that is about to step on FFN groups for the first time.

    Args:
        optimizer: about to step.
        groups: the groups that have parameters in it.

    Raises:
        RuntimeError: its state is the dense model's, it flattens stacks, or the experts are not
            what the user has written to the linears.
    """
    groups = [group for group in groups if not group.fused]
    if is_any_handed_out():
        for group in groups:
            for linear in group.linears:
                if parametrized_names(linear):
                    require_no_writes(linear)
    seen = _seen.setdefault(optimizer, weakref.WeakSet())
    new = [group for group in groups if group not in seen]
    if not new:
        return
    for group in new:
        refuse_dense_state(optimizer, group)
        for linear in group.linears:
            for name in parametrized_names(linear):
                require_sound(linear, name)
    stacks = {id(stack) for group in new for stack in group.expert_stacks()}
    _check_matrix_optimizer(optimizer, stacks)
    _warn_of_decay(optimizer, new, stacks)
    seen.update(new)


def _check_matrix_optimizer(optimizer: Optimizer, stacks: set[int]) -> None:
    """Raise for timm's Muon, and warn of other ones, if they take stacks for matrices."""
    kind = type(optimizer)
    held = [
        parameter
        for group in optimizer.param_groups
        if _is_for_matrices(kind, group)
        for parameter in group["params"]
        if id(parameter) in stacks and parameter.ndim > 1
    ]
    if not held:
        return
    ways_out = (
        'Wrap with fuse_on="step" (not for MEO), which updates each expert as a matrix of its '
        "own, or give the stacks to another optimizer."
    )
    if kind.__module__.startswith("timm."):
        raise RuntimeError(
            f"timm's {kind.__name__} would flatten each stack of N experts to one matrix. It holds "
            f"{len(held)} stacks, the first of shape {tuple(held[0].shape)}. {ways_out}"
        )
    warnings.warn(
        f"{kind.__name__} orthogonalizes matrices and holds {len(held)} expert stacks, the first "
        f"of shape {tuple(held[0].shape)}. It trains them correctly only if it treats three "
        f"dimensions as a batch of matrices, and holds no stacked biases. {ways_out}",
        stacklevel=2,
    )


def _is_for_matrices(kind: type, group: dict[str, Any]) -> bool:
    by_fallback = not group.get("use_muon", True) or group.get("use_fallback", False)
    return ("muon" in kind.__name__.lower() or "ns_steps" in group) and not by_fallback


def _warn_of_decay(optimizer: Optimizer, new: Sequence[FusionWeights], stacks: set[int]) -> None:
    """Warn if stacked biases or learned vectors decay, and plain vectors of the model do not."""
    ours = {id(tensor) for group in new for tensor in _vectors(group)}
    decaying = plain = 0
    for group in optimizer.param_groups:
        decays = bool(group.get("weight_decay", 0))
        for parameter in group["params"]:
            decaying += decays and id(parameter) in ours
            is_other = id(parameter) not in ours and id(parameter) not in stacks
            plain += not decays and is_other and parameter.ndim == 1
    if decaying and plain:
        warnings.warn(
            f"{decaying} stacked biases or learned fusion weights decay in "
            f"{type(optimizer).__name__}, while {plain} biases or norms of the model do not. Give "
            "the optimizer exfusion_param.param_groups(model, groups=groups), with your groups, "
            "or exfusion_param.param_groups(model, weight_decay).",
            stacklevel=2,
        )


def _vectors(group: FusionWeights) -> Iterator[Tensor]:
    """The group's stacked biases, shape (N, out), and learned fusion weights, shape (N,)."""
    yield from (stack for stack in group.expert_stacks() if stack.ndim == 2)
    if isinstance(group, LearnedWeights):
        yield group.weights
