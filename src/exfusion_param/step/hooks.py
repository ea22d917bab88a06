"""Hooks around an optimizer's step, which run without a call by the user.

torch runs global hooks around the `step` of every `torch.optim.Optimizer`. Ours find the FFN groups
whose parameters that optimizer holds. Before the step they refuse state that does not fit; after it
they let the memory banks move. Several optimizers that share a model, and several models, stay
apart by the parameters that each optimizer holds.

Note [The order of hooks]
Under `fuse_on="step"` the experts are updated right beside the optimizer's own step: after the
user's pre-hooks, which may change gradients, and before the user's post-hooks, which may read or
clamp weights. torch calls global pre-hooks first and global post-hooks last, so the global pre-hook
registers hooks with the optimizer itself and moves them to the inner ends. Their dicts are private;
there is no public way to order hooks.

Note [Compiled steps]
Every step passes the optimizer's own `step` another view of the optimizer, which would make
torch.compile recompile it each time. So the hooks run eagerly, and so does everything between the
inner pre-hook and the inner post-hook: they call `set_eval_frame`, as `torch.compiler.disable` does
around a function. It is private, and so is `_disable_dynamo`, which imports the compiler only when
the function is called.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Set
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import set_eval_frame
from torch._compile import _disable_dynamo
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..fusion_weights.base import FusionWeights, live_groups
from ..fusion_weights.rank_agreement import agree
from .custom_loops import note_step
from .expert_step import ExpertStep
from .first_step_checks import check_first_step
from .fused_parameter import FusedParameter
from .health import check_health, finish_checks
from .interrupts import DeferredInterrupt
from .refusals import delegates, held_by, refuse_closures, refuse_outdated, refuse_within_backward
from .slots import Slot
from .view import is_view

_warned: weakref.WeakSet[FusionWeights] = weakref.WeakSet()
_steps_without: weakref.WeakKeyDictionary[
    FusionWeights, weakref.WeakKeyDictionary[Optimizer, int]
] = weakref.WeakKeyDictionary()
_inner: weakref.WeakKeyDictionary[Optimizer, _InnerHooks] = weakref.WeakKeyDictionary()
# What optimizers hold that step now: the ids of parameters, and the FFN groups.
_holds: weakref.WeakKeyDictionary[Optimizer, tuple[Set[int], list[FusionWeights]]] = (
    weakref.WeakKeyDictionary()
)
_hooks: list[Any] = []

PATIENCE = 10
"""Steps of one optimizer within which one that holds the fusion weights has to step."""


def install() -> None:
    """Have torch call the hooks, once in a process."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


@_disable_dynamo
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if is_view(optimizer):  # a base class's `step` within a step: its hooks run again
        return
    finish_checks()
    refuse_outdated(optimizer)
    held = held_by(optimizer).keys()
    groups = list(_groups_of(held))
    by_step = [group for group in groups if group.fused]
    refuse_closures(optimizer, by_step)
    refuse_within_backward(optimizer, by_step)
    for group in groups:
        if not group.fused:
            group.before_step()
    check_first_step(optimizer, groups)
    _holds[optimizer] = (held, groups)
    agree(groups)
    if by_step and not delegates(optimizer, by_step):
        inner = _inner.get(optimizer)
        if inner is None:
            inner = _inner[optimizer] = _InnerHooks()
        inner.prepare(optimizer, by_step)


@_disable_dynamo
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if is_view(optimizer):
        return
    held, groups = _holds.pop(optimizer, (set(), []))  # none where the pre-hook never ran
    skipped = _skipped(optimizer)
    note_step(optimizer, groups)
    for group in groups:
        if not group.fused:
            with torch.no_grad():
                group.optimizer_stepped(skipped)
        _warn_if_left_out(optimizer, group, held)
    check_health(groups)


class _InnerHooks:
    """The hooks of one optimizer, next to its own step; see Note [The order of hooks]."""

    def __init__(self) -> None:
        self._groups: list[FusionWeights] = []
        self._step: ExpertStep | None = None
        self._slots: dict[FusedParameter, Slot] = {}  # of the step before
        self._interrupt = DeferredInterrupt()
        self._keys: tuple[int, int] | None = None
        self._compiler: Any = None  # torch.compile's callback, if the step is within its region

    def prepare(self, optimizer: Optimizer, groups: list[FusionWeights]) -> None:
        """Expect the optimizer's step on these groups."""
        self._groups = groups
        hooks: Any = optimizer
        before, after = hooks._optimizer_step_pre_hooks, hooks._optimizer_step_post_hooks
        if self._keys is None or self._keys[0] not in before or self._keys[1] not in after:
            self._keys = (
                optimizer.register_step_pre_hook(self._before).id,
                optimizer.register_step_post_hook(self._after).id,
            )
            optimizer.register_state_dict_pre_hook(self._warn_of_half_done)
        # At each step, as the user may have registered hooks since: the last pre-hook to run, and
        # the first post-hook.
        before.move_to_end(self._keys[0])
        after.move_to_end(self._keys[1], last=False)

    @_disable_dynamo(recursive=False)
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        groups, self._groups = self._groups, []  # taken once, so that a nested call finds none
        if is_view(optimizer) or not groups:
            return None
        self._compiler = set_eval_frame(None)  # eager until `_after`
        if self._step is not None:  # it has failed
            self._step.refuse_half_done()
            self._step.return_gradients()
        self._interrupt.begin()
        self._step = step = ExpertStep(optimizer, groups, self._slots)
        # What is returned here replaces the arguments of `step`: `self` becomes the view.
        given = args[1] if len(args) > 1 else kwargs.get("closure")
        if given is None:
            step.prepare()
            return (step.view, *args[1:]), kwargs
        closure = step.closure(given)
        if len(args) > 1:
            return (step.view, closure, *args[2:]), kwargs
        return (step.view,), kwargs | {"closure": closure}

    def _warn_of_half_done(self, optimizer: Optimizer) -> None:
        # Not an error: checkpoints take a state dict to load into, too.
        try:
            if self._step is not None:
                self._step.refuse_half_done()
        except RuntimeError as error:
            warnings.warn(str(error), stacklevel=3)

    @_disable_dynamo(recursive=False)
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if is_view(optimizer):
            return
        step = self._step
        if step is not None:
            step.finish(_skipped(optimizer))
            step.is_done = True
        self._step = None  # unless it has failed
        self._interrupt.end()
        if step is not None:  # otherwise `_before` has not set it
            set_eval_frame(self._compiler)


def _skipped(optimizer: Optimizer) -> Tensor | None:
    """Whether the optimizer's own kernel has skipped the step, for a GradScaler."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf > 0 if isinstance(found_inf, Tensor) else None


def _groups_of(held: Set[int]) -> Iterator[FusionWeights]:
    """The fusion weights of every group that has one of these parameters."""
    for group in live_groups():
        # As a rule the first is held, which is quicker than to look for all of them.
        is_held = bool(group.fused) and id(group.fused[0].parameter) in held
        if is_held or not held.isdisjoint(map(id, [*group.own_tensors(), *group.trained()])):
            yield group


def _warn_if_left_out(optimizer: Optimizer, group: FusionWeights, held: Set[int]) -> None:
    """Warn once if the experts train and the group's router or learned weights do not."""
    trained = [p for p in group._parameters.values() if p is not None and p.requires_grad]
    if not trained or not held.isdisjoint([id(parameter) for parameter in trained]):
        _steps_without.pop(group, None)
        return
    steps = _steps_without.setdefault(group, weakref.WeakKeyDictionary())
    steps[optimizer] = steps.get(optimizer, 0) + 1
    if steps[optimizer] == PATIENCE and group not in _warned:
        _warned.add(group)
        warnings.warn(
            f"The fusion weights of {group.group!r} are in no optimizer that has stepped. If the "
            "optimizer was made before wrap(), make it after; otherwise freeze them.",
            stacklevel=2,
        )
