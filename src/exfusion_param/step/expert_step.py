"""One step of an optimizer that holds wrapped parameters, see Note [A step]."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..fusion_weights.base import FusionWeights
from ..fusion_weights.variants import StaticWeights
from ..tensors.sliced_sums import fuse_into
from .fused_parameter import FusedParameter
from .fusion_gradients import fusion_gradients, gather_learned
from .one_pass import OnePassOptimizer
from .refusals import held_by, refuse_graph, refuse_own_dicts
from .slots import Slot, slot_of
from .starts import refuse_tied, warn_of_starts
from .torch_optimizers import StandIns, steps_one_by_one, update_one_by_one
from .view import copy_back, view_of

# The last one of each FFN group, which its optimizer's hooks keep if it failed.
_steps: weakref.WeakKeyDictionary[FusionWeights, weakref.ref[ExpertStep]] = (
    weakref.WeakKeyDictionary()
)


def refuse_half_done(groups: Iterable[FusionWeights]) -> None:
    """Raise if the last step on one of these groups moved some experts and not others."""
    for group in groups:
        step = ref() if (ref := _steps.get(group)) is not None else None
        if step is not None:
            step.refuse_half_done()


class ExpertStep:
    """A step of an optimizer, from its last pre-hook to its first post-hook.

    Args:
        optimizer: about to step.
        groups: the FFN groups that have a parameter in it, all with `fuse_on="step"`.
        known: the slots of the optimizer's step before; this step's are added.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        groups: Sequence[FusionWeights],
        known: dict[FusedParameter, Slot],
    ) -> None:
        self.optimizer = optimizer
        self.groups = groups
        self._lent: list[tuple[nn.Parameter, Tensor, Tensor | None]] = []
        self._is_prepared = False
        self._state = optimizer.state
        self._is_under_way = False
        self.is_done = False
        self._versions: list[int] = []
        self._copies: list[Tensor] = []
        if isinstance(optimizer, OnePassOptimizer):
            optimizer.refuse_unsupported()
        self._place = place = held_by(optimizer)
        self._settings = [dict(group) for group in optimizer.param_groups]
        with torch.no_grad():
            gather_learned(groups)
            self._slots = {}
            for group in groups:
                fused_here: list[Any] = group.fused
                self._slots[group] = [
                    slot_of(fused, optimizer, place, known.get(fused)) for fused in fused_here
                ]
        every = [slot for slots in self._slots.values() for slot in slots]
        self._may_be_loaded = bool([slot for slot in every if known.get(slot.fused) is not slot])
        known.update([(slot.fused, slot) for slot in every])
        self._held = [slot for slot in every if slot.group_index is not None]
        refuse_tied(every)
        warn_of_starts(optimizer, groups)
        if isinstance(optimizer, OnePassOptimizer):
            optimizer.make_ready()
        self._stand_ins = self._make_stand_ins()
        self.view = self._make_view()
        this = weakref.ref(self)
        for group in groups:
            _steps[group] = this

    def refuse_half_done(self) -> None:
        """Raise if the step failed when some experts had moved, and nothing was loaded since."""
        has_moved = self._is_under_way or (self._stand_ins and self._stand_ins.have_moved())
        if has_moved and not self.is_done and self.optimizer.state is self._state:
            raise RuntimeError(
                f"A step of {type(self.optimizer).__name__} failed when some experts had moved and "
                "others had not. Load the last checkpoint, model and optimizer."
            )

    def _make_stand_ins(self) -> StandIns | None:
        if isinstance(self.optimizer, OnePassOptimizer) or steps_one_by_one(self.optimizer):
            return None
        if self._may_be_loaded:
            refuse_own_dicts(self.optimizer, [slot.parameter for slot in self._held])
        return StandIns(self.optimizer, self._held)

    def _make_view(self) -> Optimizer:
        """The optimizer as its own `step` is to see it, without the wrapped parameters."""
        if self._stand_ins is None:
            return view_of(self.optimizer, {id(slot.parameter): [] for slot in self._held})
        view = view_of(self.optimizer, self._stand_ins.units)
        view.state = self._stand_ins.state
        if self._may_be_loaded:
            # Some optimizers restore dtypes in it, which `load_state_dict` has cast.
            view.__setstate__({"state": view.state, "param_groups": view.param_groups})
        return view

    def closure(self, evaluate: Callable[[], Any]) -> Callable[[], Any]:
        """The step's closure, after which the gradients are there."""

        def prepared() -> Any:
            if self._is_prepared or (self._stand_ins and self._stand_ins.have_moved()):
                raise RuntimeError(
                    f"{type(self.optimizer).__name__} moves the weights and evaluates its closure "
                    'again, which experts under fuse_on="step" cannot follow. Wrap with '
                    'fuse_on="forward".'
                )
            loss = evaluate()
            self.prepare()
            return loss

        return prepared

    @torch.no_grad()
    def prepare(self) -> None:
        """Take writes from outside, and give fusion weights and experts their gradients."""
        self._is_prepared = True
        for slot in self._held:
            if (gradient := slot.parameter.grad) is not None and gradient.requires_grad:
                refuse_graph(self.optimizer)
        for group, slots in self._slots.items():
            group.before_step()
            now = group.current_weights()
            for slot in slots:
                if slot.group_index is None and slot.fused.is_stepping:
                    continue  # this step runs within that of the optimizer that holds it
                slot.fused.writes.take(slot.part, slot.stack, slot.experts, now)
        self._lend_gradients()
        if self._stand_ins is not None:
            self._stand_ins.give_gradients()
        for slot in self._held:
            slot.fused.is_stepping = True
        self._versions = [slot.part._version for slot in self._held]
        if self._may_be_loaded:  # once, as a write to `.data` leaves no trace in the version
            self._copies = [slot.part.clone() for slot in self._held]

    @torch.no_grad()
    def finish(self, skipped: Tensor | None) -> None:
        """Move the banks, update the experts, and fuse them.

        Args:
            skipped: as for `FusionWeights.optimizer_stepped`.
        """
        self.return_gradients()
        self._refuse_own_lists()
        self._is_under_way = True
        if self._stand_ins is not None and self._may_be_loaded:
            refuse_own_dicts(self.view, itertools.chain(*self._stand_ins.units.values()))
        copy_back(self.view, self.optimizer)
        for group in self.groups:
            group.optimizer_stepped(skipped)
        if not self._is_prepared:  # a closure that was never called
            return
        gather_learned(self.groups)
        now = {group: group.current_weights().clone() for group in self.groups}
        is_fused: set[Slot] = set()
        if isinstance(self.optimizer, OnePassOptimizer):
            is_fused = self.optimizer.update_experts(self._held, now)
        elif self._stand_ins is not None:
            self._stand_ins.take_states()
        else:
            update_one_by_one(self.optimizer, self._settings, self._held)
        for group, slots in self._slots.items():
            for slot in slots:
                if slot.group_index is None and (
                    isinstance(group, StaticWeights) or slot.fused.is_stepping
                ):
                    continue  # as it was, which an optimizer in backward relies on
                if slot not in is_fused:
                    fuse_into(slot.part, slot.experts, now[group])
                slot.fused.writes.record(slot.part, slot.stack, slot.experts, now[group])
                if slot.group_index is None:
                    continue
                if (gradient := slot.parameter.grad) is not None:
                    slot.fused.note_applied(gradient)
                else:
                    slot.allow_loading()

    def _refuse_own_lists(self) -> None:
        """Raise if the optimizer has written to a parameter that its `step` was not given."""
        now = [slot.part._version for slot in self._held]
        pairs = zip(self._held, self._copies, strict=False)  # no copies after the first step
        is_same = self._versions in ([], now) and all(_is_same(t.part, copy) for t, copy in pairs)
        self._copies.clear()
        if not is_same:
            raise RuntimeError(
                f"{type(self.optimizer).__name__} steps on its own list of parameters, not on "
                "its param_groups, and wrote to weights that are fused from experts. Load them "
                'again, and wrap with fuse_on="forward".'
            )

    def _lend_gradients(self) -> None:
        """Add the step's gradients to what autograd gave routers and learned fusion weights."""
        for parameter, gradient in fusion_gradients(self._slots, self._place).items():
            if id(parameter) not in self._place:
                continue  # for the step of another optimizer
            before = parameter.grad
            lent = gradient if before is None else before + gradient
            self._lent.append((parameter, lent, before))
            parameter.grad = lent

    def return_gradients(self) -> None:
        """Leave to routers and learned fusion weights what autograd gave them."""
        for slot in self._held:
            slot.fused.is_stepping = False
        for parameter, lent, before in self._lent:
            if parameter.grad is lent:  # it may have been reset after a step that failed
                parameter.grad = before
        self._lent.clear()


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.is_meta or bool(((one == other) | one.isnan()).all())
