"""The base of optimizers that update expert stacks in one pass; see adamw_and_sgd.py."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..fusion_weights.base import FusionWeights
from ..tensors.precision import accumulation_dtype
from ..tensors.shards import local
from .fused_parameter import EXPERTS
from .slots import Slot
from .stack_step import Batch, Stack, StackPlan
from .state_storage import StateDtype, check_state_dtype, stored

OWN_SETTINGS = ("state_dtype", "expert_dtype", "fused", "foreach")
"""Of a group, which a loaded state dict does not change."""


_ZERO = torch.zeros(())

# Of each parameter group by its index, with what they were made for.
_plans: weakref.WeakKeyDictionary[Optimizer, dict[int, tuple[list[Any], StackPlan]]] = (
    weakref.WeakKeyDictionary()
)


class OnePassOptimizer(Optimizer):
    """The base class of optimizers of experts."""

    required: ClassVar[Mapping[str, Any]]
    """Settings of torch's optimizer that experts have with these values only."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group.

        Raises:
            ValueError: it asks for what experts cannot have.
        """
        if isinstance(param_group, dict):
            self._refuse_unsupported(param_group)
        super().add_param_group(param_group)

    def _set_up(self, state_dtype: StateDtype | None, expert_dtype: torch.dtype | None) -> None:
        """Add what torch's optimizer does not know, at the end of `__init__`."""
        check_state_dtype(state_dtype)
        if expert_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                f"expert_dtype must be None, torch.float32 or torch.bfloat16, got {expert_dtype!r}."
            )
        self.defaults |= {"state_dtype": state_dtype, "expert_dtype": expert_dtype}
        for group in self.param_groups:
            group.setdefault("state_dtype", state_dtype)
            group.setdefault("expert_dtype", expert_dtype)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this optimizer, or of torch's that it is.

        Experts and their states keep the dtypes that they were saved in until the next step, which
        stores them as this optimizer does.

        Raises:
            ValueError: the groups differ, or ask for what experts cannot have.
        """
        for group in state_dict["param_groups"]:
            self._refuse_unsupported(group)
        before = [{name: group.get(name) for name in OWN_SETTINGS} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, settings in zip(self.param_groups, before, strict=True):
            group.update(settings)
        self._take_uncast(state_dict)

    def make_ready(self) -> None:
        """A step begins, for which wrapped parameters have experts."""

    def refuse_unsupported(self) -> None:
        """Raise a ValueError if a group asks for what experts cannot have."""
        for group in self.param_groups:
            self._refuse_unsupported(group)

    def _refuse_unsupported(self, group: dict[str, Any]) -> None:
        for name, value in self.required.items():
            if group.get(name, value) != value:
                raise ValueError(
                    f"{type(self).__name__} has no {name}={group[name]} for experts. Leave it out, "
                    "or use torch's own optimizer."
                )

    def _take_uncast(self, state_dict: dict[str, Any]) -> None:
        """Take experts and their states in the dtypes of the file; torch casts them all."""
        saved = (key for group in state_dict["param_groups"] for key in group["params"])
        held = (parameter for group in self.param_groups for parameter in group["params"])
        for key, parameter in zip(saved, held, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if name.startswith(EXPERTS) and isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)

    @torch.no_grad()
    def update_experts(
        self, slots: Iterable[Slot], now: Mapping[FusionWeights, Tensor]
    ) -> set[Slot]:
        """Update the experts of parameters that have a gradient, and fuse them.

        Args:
            slots: of the wrapped parameters that this optimizer holds.
            now: the fusion weights to fuse with, shape (N,), of each FFN group.

        Returns:
            The slots in which a parameter was fused.
        """
        due = {
            slot: grad if type(grad) is Tensor else local(grad)
            for slot in slots
            if (grad := slot.parameter.grad) is not None
        }
        for index, group in enumerate(self.param_groups):
            of_group = [slot for slot in due if slot.group_index == index]
            steps = [
                (
                    due[slot],
                    slot.fused.weights_of_gradient,
                    slot.part,
                    now[slot.fused.fusion_weights],
                )
                for slot in of_group
            ]
            update = functools.partial(self._update, group)
            self._plan(index, of_group).step(steps, update, _generators(group))
        return set(due)

    def _plan(self, index: int, slots: Sequence[Slot]) -> StackPlan:
        """How the stacks of a group are cut, as at the step before if they are the same."""
        group, plans = self.param_groups[index], _plans.setdefault(self, {})
        kinds = self._kinds_of_state(group)
        keys = [EXPERTS, "step", *[f"{EXPERTS}.{name}" for name in kinds]]
        before, now = plans.get(index), _basis_of(group, slots, keys)
        if before is not None and len(before[0]) == len(now) and all(map(is_, before[0], now)):
            return before[1]
        plan = StackPlan([self._stack(slot, group, kinds) for slot in slots])
        plans[index] = _basis_of(group, slots, keys), plan
        return plan

    def _stack(self, slot: Slot, group: dict[str, Any], kinds: Mapping[str, bool]) -> Stack:
        """A stack with its states, made at the first step and stored as asked for after a load."""
        state, dtype = slot.state, slot.part.dtype
        if group["expert_dtype"] is not None or group["state_dtype"] is not None:
            dtype = accumulation_dtype(dtype)
        if group["expert_dtype"] not in (None, slot.experts.dtype):
            state[EXPERTS] = state[EXPERTS].to(group["expert_dtype"])
            slot.experts = local(state[EXPERTS])
        stored_as = dtype if group["state_dtype"] is None else group["state_dtype"]
        states = []
        for name, signed in kinds.items():
            key = f"{EXPERTS}.{name}"
            value = state.get(key)
            if type(value) is not Tensor or value.dtype != stored_as:
                value = state[key] = stored(value, state[EXPERTS], stored_as, signed)
            states.append(local(value))
        return Stack(slot.experts, states, self._count_of(slot), dtype)

    def _kinds_of_state(self, group: dict[str, Any]) -> dict[str, bool]:
        """The names of the experts' states, and whether they may be negative."""
        raise NotImplementedError

    def _count_of(self, slot: Slot) -> Tensor:
        """How many steps the experts have made, shape (), as torch's optimizers hold it."""
        return _ZERO

    def _update(self, group: dict[str, Any], batch: Batch) -> None:
        """Update the experts of a batch."""
        raise NotImplementedError

    def _of_grad_scaler(self) -> dict[str, Any]:
        """The scale and the skip flag of a GradScaler for this step."""
        return {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}


def _basis_of(group: dict[str, Any], slots: Sequence[Slot], keys: Sequence[str]) -> list[Any]:
    """What a plan is made for: dtypes; slots, which stay the same while experts do; states."""
    tensors = [each for slot in slots for each in (slot, *map(slot.state.get, keys))]
    return [group["state_dtype"], group["expert_dtype"], *tensors]


def _generators(group: dict[str, Any]) -> Callable[[torch.device], torch.Generator]:
    """For each device what rounds this step's numbers: alike on all replicas, and resumed."""
    group["rounding_seed"] = seed = group.get("rounding_seed", 0) + 1
    return functools.cache(lambda device: torch.Generator(device).manual_seed(seed))
