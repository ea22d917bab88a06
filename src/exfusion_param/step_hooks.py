"""What happens at an optimizer's step, without a call by the user.

torch runs global hooks around the `step` of every `torch.optim.Optimizer`. Ours find the FFN groups
whose parameters that optimizer holds. Before the step they refuse state that does not fit the
expert stacks; after it they let the memory banks move. Several optimizers that share a model, and
several models, stay apart by the parameters that each optimizer holds.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Muon
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .guards import finish_looking, look_at
from .ranks import ALONE, all_ranks

if TYPE_CHECKING:
    from .fusion_weights import FusionWeights

# In the order of wrapping, which is the same on all ranks.
_watched: weakref.WeakKeyDictionary[FusionWeights, None] = weakref.WeakKeyDictionary()
_agreed: weakref.WeakSet[FusionWeights] = weakref.WeakSet()
_outdated: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
_warned: weakref.WeakSet[FusionWeights] = weakref.WeakSet()
_steps_without: weakref.WeakKeyDictionary[
    FusionWeights, weakref.WeakKeyDictionary[Optimizer, int]
] = weakref.WeakKeyDictionary()
_hooks: list[Any] = []

PATIENCE = 10
"""Steps of one optimizer in which another may step that holds the fusion weights."""


def watch(weights: FusionWeights) -> None:
    """Tell these fusion weights of the optimizers' steps, for as long as they live."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))
    _watched[weights] = None


def watched() -> list[FusionWeights]:
    """All fusion weights that live, in the order of wrapping."""
    return [weights for ref in _watched.keyrefs() if (weights := ref()) is not None]


def outdate(parameters: Iterable[nn.Parameter]) -> None:
    """Refuse optimizers that hold these parameters, which others have taken the place of."""
    _outdated.update((id(parameter), parameter) for parameter in parameters)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    finish_looking()
    held = _held(optimizer)
    if not held.isdisjoint(_outdated.keys()):
        raise RuntimeError(
            f"{type(optimizer).__name__} was made before fully_shard(). Make the optimizer after."
        )
    groups = list(_groups_of(held))
    for weights in groups:
        _refuse_dense_state(optimizer, weights)
        if weights.config.displacement == "shared":
            _refuse_coupled_decay(optimizer, weights)
        if weights.config.expert_dtype != "model":
            _refuse_rounding_to_nearest(optimizer, weights, held)
    _require_agreement(groups)
    with_leaves = [weights for weights in groups if weights.config.fuse_on == "step"]
    return _pull_back(with_leaves, optimizer, args, kwargs) if with_leaves else None


def _pull_back(groups: list[FusionWeights], optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    """Pull gradients back now, or in the closure; the step's arguments if they change."""
    from .pull_back import pull_back, updates_apart, with_pull_back

    takes = not updates_apart(optimizer)
    if (closure := kwargs.get("closure")) is not None:
        return args, kwargs | {"closure": with_pull_back(closure, groups, optimizer, takes)}
    if len(args) > 1 and args[1] is not None:  # args[0] is the optimizer
        closure = with_pull_back(args[1], groups, optimizer, takes)
        return (args[0], closure, *args[2:]), kwargs
    pull_back(groups, optimizer, takes)
    return None


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # Set by GradScaler around the step of optimizers that skip inside their own kernel.
    found_inf = getattr(optimizer, "found_inf", None)
    skipped = found_inf > 0 if isinstance(found_inf, Tensor) else None
    held = _held(optimizer)
    groups = list(_groups_of(held))
    for weights in groups:
        weights.optimizer_stepped(skipped)
    _update_stacks(groups, optimizer)
    _decay_starts(groups, optimizer, skipped)
    for weights in groups:
        weights.settle()
        for leaf in weights.leaves():  # torch's distributed checkpoints miss a state for it
            if id(leaf) in held and optimizer.state:
                optimizer.state.setdefault(leaf, {})
        _warn_if_left_out(optimizer, weights, held)
    look_at(groups)


def _update_stacks(groups: Iterable[FusionWeights], optimizer: Optimizer) -> None:
    from .pull_back import update_stacks, updates_apart

    if updates_apart(optimizer):
        update_stacks((w for w in groups if w.config.fuse_on == "step"), optimizer)


def _decay_starts(
    groups: Iterable[FusionWeights], optimizer: Optimizer, skipped: Tensor | None
) -> None:
    """Decay frozen starting values as the optimizer has decayed the displacement from them."""
    shared = [weights for weights in groups if weights.config.displacement == "shared"]
    if not shared:
        return
    from .pull_back import decay_starts

    for group in optimizer.param_groups:
        if group.get("weight_decay"):
            decay = group["lr"] * group["weight_decay"]
            held = {id(parameter) for parameter in group["params"]}
            decay_starts(shared, held, decay if skipped is None else decay * ~skipped)


def _held(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _groups_of(held: set[int]) -> Iterator[FusionWeights]:
    """The fusion weights of every group that has one of these parameters."""
    for weights in watched():
        parameters = itertools.chain(weights.parameters(), weights.expert_parameters())
        if any(id(parameter) in held for parameter in parameters):
            yield weights


def _require_agreement(groups: Iterable[FusionWeights]) -> None:
    """Raise at the first step if the ranks of the job differ; `fully_shard` has looked itself."""
    new = {weights: weights.group for weights in groups if weights not in _agreed}
    if new and (ranks := all_ranks()) is not ALONE:
        unseen = {weights: name for weights, name in new.items() if weights.sharing is None}
        if unseen:
            from .agreement import require_agreement

            require_agreement(unseen, ranks)
    _agreed.update(new)


def _refuse_dense_state(optimizer: Optimizer, weights: FusionWeights) -> None:
    """Raise if the optimizer remembers the dense tensor that a stack has taken the place of."""
    for stack in weights.expert_stacks():
        for value in optimizer.state.get(stack, {}).values():
            is_dense = isinstance(value, Tensor) and value.shape == stack.shape[1:]
            if is_dense and stack.ndim > 1:  # FSDP1 makes it flat
                raise RuntimeError(
                    f"{type(optimizer).__name__} holds state of shape {tuple(value.shape)} for an "
                    f"expert stack of shape {tuple(stack.shape)} in {weights.group!r}: it was made "
                    "before wrap(). Make the optimizer after wrap()."
                )


def _refuse_coupled_decay(optimizer: Optimizer, weights: FusionWeights) -> None:
    """Raise unless weight decay is known to be apart from the gradient."""
    moved = set(map(id, weights.moved_parameters()))
    for group in optimizer.param_groups:
        is_decoupled = group.get("decoupled_weight_decay") or isinstance(optimizer, Muon)
        if not group.get("weight_decay") or is_decoupled:
            continue
        if not moved.isdisjoint(map(id, group["params"])):
            raise RuntimeError(
                f"{type(optimizer).__name__} is not known to decouple weight decay from the "
                f"gradient, which the shared displacement of {weights.group!r} needs. Use AdamW; "
                "or set weight_decay=0 for it; or, if the optimizer does p -= lr * weight_decay * "
                'p, say so in its parameter groups: group["decoupled_weight_decay"] = True.'
            )


def _refuse_rounding_to_nearest(
    optimizer: Optimizer, weights: FusionWeights, held: set[int]
) -> None:
    """Raise unless the optimizer, if it moves the stacks, rounds them stochastically."""
    from .expert_optimizers import ExpertOptimizer

    if not isinstance(optimizer, ExpertOptimizer) and any(
        id(stack) in held and stack.requires_grad for stack in weights.expert_stacks()
    ):
        raise RuntimeError(
            f"{type(optimizer).__name__} would round the experts of {weights.group!r}, which are "
            "stored in bfloat16, to the nearest number and so lose small updates. Use ExpertAdamW "
            'or ExpertSGD, or wrap with expert_dtype="model".'
        )


def _warn_if_left_out(optimizer: Optimizer, weights: FusionWeights, held: set[int]) -> None:
    """Warn once if the experts train and the group's router or learned weights do not."""
    trainable = [parameter for parameter in weights.parameters() if parameter.requires_grad]
    if not trainable or any(id(parameter) in held for parameter in trainable):
        _steps_without.pop(weights, None)
        return
    steps = _steps_without.setdefault(weights, weakref.WeakKeyDictionary())
    steps[optimizer] = steps.get(optimizer, 0) + 1
    if steps[optimizer] == PATIENCE and weights not in _warned:
        _warned.add(weights)
        warnings.warn(
            f"The fusion weights of {weights.group!r} are in no optimizer that has stepped. If the "
            "optimizer was made before wrap(), make it after; otherwise freeze them.",
            stacklevel=2,
        )
