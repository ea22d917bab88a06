"""The slot of a fused parameter in an optimizer: the parameter with its state and its experts.

A slot is looked up at each step, and serves again as long as none of the three has been replaced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..tensors.shards import local
from .dense_states import share_among_experts
from .fused_parameter import EXPERTS, FusedParameter

_LOADED_BY = ("step", "mu_product", "eta", "mu")  # the latter by NAdam and ASGD


@dataclasses.dataclass(slots=True, eq=False)
class Slot:
    """A fused parameter with the state and the experts that an optimizer has for it.

    Args:
        fused: itself.
        parameter: the linear's, shape (*S).
        part: what this rank holds of it, without a graph.
        state: of its optimizer, with the experts.
        stack: the experts, shape (N, *S); a DTensor if the parameter is one.
        experts: this rank's part of them.
        group_index: of the parameter group; None if another optimizer holds the parameter.
    """

    fused: FusedParameter
    parameter: nn.Parameter
    part: Tensor
    state: dict[str, Any]
    stack: Tensor
    experts: Tensor
    group_index: int | None

    def allow_loading(self) -> None:
        """Give the experts of a parameter without a gradient what torch's optimizers load by.

        They take no state that has entries, such as the experts, and not these.
        """
        if len(self.state) == 1:
            self.state |= {name: torch.zeros(()) for name in _LOADED_BY}


def slot_of(
    fused: FusedParameter,
    optimizer: Optimizer,
    place: Mapping[int, int],
    before: Slot | None,
) -> Slot:
    """The slot of a fused parameter, for a step.

    Args:
        fused: itself.
        optimizer: about to step.
        place: index of its parameter group that holds a parameter, by the parameter's id.
        before: its slot at the step before.
    """
    parameter = fused.linear._parameters.get(fused.name)  # what the property gives, and quicker
    parameter = fused.parameter if parameter is None else parameter
    group_index = place.get(id(parameter))
    owner = optimizer if group_index is not None else fused.optimizer
    state = fused.own_state if owner is None else owner.state[parameter]
    if (  # nothing was moved or loaded since
        before is not None
        and before.state is state
        and before.parameter is parameter
        and before.group_index == group_index
        and state.get(EXPERTS) is before.stack
        and type(parameter) is nn.Parameter
        and parameter.data_ptr() == before.part.data_ptr()
        and parameter.dtype == before.part.dtype
    ):
        return before
    fused.require_own()
    if EXPERTS not in state:
        experts = fused.own_state.get(EXPERTS)
        if experts is None:
            experts = fused.drawn(is_start=True)
        share_among_experts(state, fused.start.name, len(experts))
        state[EXPERTS] = experts
    elif before is None or before.stack is not state[EXPERTS]:
        fused.fusion_weights.starts_around_changed = False  # the experts were loaded
    if group_index is not None:
        fused.set_optimizer(optimizer)
    experts = state[EXPERTS]
    fused.keep(experts)
    return Slot(fused, parameter, local(parameter), state, experts, local(experts), group_index)


def have_stepped(state: Mapping[str, Any]) -> bool:
    """Whether experts have states of their own; False for what `Slot.allow_loading` put there."""
    has_own = any(key.startswith(f"{EXPERTS}.") for key in state)
    return has_own or "step" not in state or float(state["step"]) > 0
