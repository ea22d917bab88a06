"""Any optimizer's step on experts: it sees each expert as a parameter of its own.

Note [States of experts]
The states of experts are kept in the optimizer's state of the parameter that they fuse into:
"experts.exp_avg" holds the N values of "exp_avg", stacked if they are tensors of one shape and
kind, and as a list otherwise. What all experts share, such as "step", keeps its name, by which
torch's optimizers know it when they load a state.

Note [One by one, or all together]
The states of torch's own optimizers belong to single parameters, so a step on one parameter after
the other is a step on all, and only one stack has its N-fold gradient at a time. Another library's
optimizer may couple its parameters (LAMB clips by the norm of all gradients), so it gets all
experts at once, in place of the parameters that they fuse into.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim

from ..tensors.shards import as_stack, local, stacked, unstacked
from ..tensors.sliced_sums import fuse_into
from .fused_parameter import EXPERTS, FusedParameter
from .slots import Slot, have_stepped

_ELEMENTWISE = {
    optim.ASGD,
    optim.Adadelta,
    optim.Adagrad,
    optim.Adam,
    optim.AdamW,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.SGD,
}
"""Optimizers for which a stack is as good as its experts; no subclass is known to be one."""

_BY_TENSOR = {optim.Adafactor, optim.Muon, optim.Rprop}
"""Other ones whose parameters know nothing of each other."""

_SHARED = "step"


def steps_one_by_one(optimizer: optim.Optimizer) -> bool:
    """Whether an optimizer may step on one parameter after the other."""
    return type(optimizer) in _ELEMENTWISE | _BY_TENSOR


def update_one_by_one(
    optimizer: optim.Optimizer, settings: Sequence[dict[str, Any]], slots: Iterable[Slot]
) -> None:
    """Have an optimizer step on the experts of one parameter after the other.

    Args:
        optimizer: one that `steps_one_by_one`.
        settings: of its parameter groups, as they were before its step on all else.
        slots: of the parameters that it holds.
    """
    step: Any = type(optimizer).step
    is_whole = type(optimizer) in _ELEMENTWISE
    room = _Room()
    for slot in slots:
        if (gradient := slot.parameter.grad) is None or slot.group_index is None:
            continue
        state = slot.state
        experts = [state[EXPERTS]] if is_whole else unstacked(state[EXPERTS])
        units = [nn.Parameter(expert) for expert in experts]
        grads = _gradients(slot.fused, gradient, room, is_whole)
        for unit, grad in zip(units, grads, strict=True):
            unit.grad = grad.to(unit.dtype)  # the model may have been converted since
        view: Any = object.__new__(type(optimizer))
        view.__dict__.update(optimizer.__dict__)
        view.param_groups = [settings[slot.group_index] | {"params": units}]
        view.state = defaultdict(dict, zip(units, _states(state, units, is_whole), strict=True))
        step.__wrapped__(view)  # without torch's hooks, which have brought us here
        _store(state, [view.state[unit] for unit in units], is_whole)


class StandIns:
    """Experts that take the places of the parameters that they fuse into, within one step.

    Args:
        optimizer: about to step.
        slots: of the wrapped parameters that it holds.

    Attributes:
        state: the optimizer's, with the experts' own.
        units: the experts by the id of the parameter that they stand in for.
    """

    def __init__(self, optimizer: optim.Optimizer, slots: Sequence[Slot]) -> None:
        self.state: defaultdict[Any, dict[str, Any]] = defaultdict(dict, optimizer.state)
        self.units: dict[int, list[nn.Parameter]] = {}
        self._optimizer = optimizer
        self._slots = slots
        self._versions = [slot.experts._version for slot in slots]
        for slot in slots:
            units = [nn.Parameter(expert) for expert in unstacked(slot.state[EXPERTS])]
            for unit in units:  # what the user has set, such as a factor of the learning rate
                vars(unit).update(vars(slot.parameter))
            self.units[id(slot.parameter)] = units
            self.state.update(zip(units, _states(slot.state, units, is_whole=False), strict=True))

    def have_moved(self) -> bool:
        """Whether the optimizer has moved an expert already."""
        return [slot.experts._version for slot in self._slots] != self._versions

    def give_gradients(self) -> None:
        """Give each expert its gradient."""
        for slot in self._slots:
            if (gradient := slot.parameter.grad) is not None:
                gradients = _gradients(slot.fused, gradient, _Room(), is_whole=False)
                for unit, grad in zip(self.units[id(slot.parameter)], gradients, strict=True):
                    unit.grad = grad.to(unit.dtype)

    def take_states(self) -> None:
        """Keep each expert, which an optimizer may have put elsewhere, and what it remembers."""
        averages = callable(getattr(self._optimizer, "train", None))
        for slot in self._slots:
            for unit, expert in zip(
                self.units[id(slot.parameter)], unstacked(slot.stack), strict=True
            ):
                if local(unit).data_ptr() != local(expert).data_ptr():  # by `p.data = ...`
                    local(expert).copy_(local(unit))
            states = [self.state[unit] for unit in self.units[id(slot.parameter)]]
            if any(states):
                _store(slot.state, states, is_whole=False)
            if averages:  # schedule-free, whose `eval()` moves a parameter by its state
                _fuse_states(slot.fused, slot.state)
        units = {unit for units in self.units.values() for unit in units}
        self._optimizer.state.update(
            {key: value for key, value in self.state.items() if key not in units}
        )


class _Room:
    """Memory that one stack of gradients after the other uses.

    A system that gives out memory sets it to zero first, which takes several times as long as the
    product that is written there.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def for_stack(self, count: int, part: Tensor) -> Tensor:
        """An uninitialized stack, shape (count, *S), of a tensor's dtype and device."""
        size = count * part.numel()
        memory = self._memory
        is_other = memory.dtype != part.dtype or memory.device != part.device
        if is_other or memory.numel() < size:
            memory = self._memory = part.new_empty(size)
        return memory[:size].view(count, *part.shape)


def _gradients(
    fused: FusedParameter, gradient: Tensor, room: _Room, is_whole: bool
) -> list[Tensor]:
    """`w_i G` for each expert, or of all in one stack."""
    part = local(gradient)
    weights = fused.weights_of_gradient.to(
        part.device, torch.promote_types(part.dtype, torch.float32)
    )
    stack = room.for_stack(len(weights), part)
    torch.mul(weights.view(-1, *[1] * part.ndim), part, out=stack)
    joined = as_stack(stack, gradient)
    return [joined] if is_whole else unstacked(joined)


def _states(
    state: dict[str, Any], units: Sequence[nn.Parameter], is_whole: bool
) -> list[dict[str, Any]]:
    """The states of experts as an optimizer knows them, in the memory of the stored ones."""
    states: list[dict[str, Any]] = [{} for _ in units]
    if not have_stepped(state):
        return states
    for key, value in state.items():
        if key == EXPERTS or f"{EXPERTS}.{key}" in state:  # of the parameter itself
            continue
        name = key.removeprefix(f"{EXPERTS}.")
        if is_whole:
            values = [value]
        elif name == key:
            values = [value.clone() if isinstance(value, Tensor) else value for _ in units]
        else:
            values = unstacked(value) if isinstance(value, Tensor) else value
        for each, single in zip(states, values, strict=True):
            if single is not None:
                each[name] = single
    return states


def _store(state: dict[str, Any], states: Sequence[dict[str, Any]], is_whole: bool) -> None:
    """Keep the states of experts in that of the parameter that they fuse into."""
    for name in dict.fromkeys(name for each in states for name in each):
        # Of some experts only where an optimizer keeps one state for several, or parts them.
        values = [each.get(name) for each in states]
        if name == _SHARED:
            state[name] = values[0]
        elif name in state and values[0] is state[name]:  # of the parameter, such as a flag
            continue
        elif is_whole and getattr(values[0], "ndim", 0) == 0:  # of all experts
            state[name] = values[0]
        elif is_whole:
            state[f"{EXPERTS}.{name}"] = values[0]
        else:
            state[f"{EXPERTS}.{name}"] = _joined(values, state.get(f"{EXPERTS}.{name}"))


def _joined(values: list[Any], before: Any) -> Any:
    """The values of all experts; `before` where they are written in its memory."""
    if isinstance(before, Tensor) and all(map(_is_in, values, unstacked(before))):
        return before
    is_plain = all(isinstance(v, Tensor) and type(local(v)) is Tensor for v in values)
    if is_plain and len({(value.shape, value.dtype) for value in values}) == 1:
        return stacked(values)
    return values


def _is_in(value: Any, place: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.shape != place.shape or value.dtype != place.dtype:
        return False
    return local(value).data_ptr() == local(place).data_ptr()


def _fuse_states(fused: FusedParameter, state: dict[str, Any]) -> None:
    """Give the parameter itself the fused states of its shape, by which others may move it."""
    weights = fused.fusion_weights.current_weights()
    stacks = {
        key.removeprefix(f"{EXPERTS}."): value
        for key, value in state.items()
        if key.startswith(f"{EXPERTS}.") and isinstance(value, Tensor)
    }
    for name, stack in stacks.items():
        if stack.shape[1:] == fused.parameter.shape:
            state[name] = torch.zeros_like(fused.parameter)
            fuse_into(local(state[name]), local(stack), weights)
