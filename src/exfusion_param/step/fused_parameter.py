"""A weight or bias of a wrapped linear under `fuse_on="step"`, and the experts it is fused from.

Note [Writes from outside]
Whatever the parameter holds when a step begins is what its experts fuse to. What was written since
the last step is found by comparison with a copy, so it does not matter how it was written, and is
added to every expert. Where the copy cannot be trusted, because experts or fusion weights were
loaded, the experts are fused for the comparison.
"""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..tensors.expert_starts import ExpertStart
from ..tensors.shards import as_stack, local, part_of, whole
from ..tensors.sliced_sums import fuse_into
from .turn import EXPERTS, Turn

if TYPE_CHECKING:
    from ..fusion_weights.base import FusionWeights


class FusedParameter:
    """A parameter of a dense linear whose value is fused at each step.

    Args:
        weights: the group's fusion weights.
        linear: the module that holds the parameter.
        name: "weight" or "bias".
        start: how its experts are drawn.
        base: the tensor around which they are drawn; None takes the parameter as it is then.
    """

    def __init__(
        self,
        weights: FusionWeights,
        linear: nn.Module,
        name: str,
        start: ExpertStart,
        base: Tensor | None,
    ) -> None:
        self.weights = weights
        self.linear = linear
        self.name = name
        self.start = start
        self.base = base
        self.shape = linear.get_parameter(name).shape
        self.weights_of_gradient = torch.empty(0)
        """The fusion weights under which the present gradient was taken, shape (N,)."""
        self._forget()

    def _forget(self) -> None:
        self._owner: weakref.ref[Optimizer] | None = None
        # The experts, for the next optimizer if this one is deleted or its state reset.
        self._own_state: dict[str, Any] = {}
        self._written: Tensor | None = None  # this rank's part, as the last step left it
        self._used: Tensor | None = None  # the fusion weights it is fused with, shape (N,)
        self._fused_from: tuple[int, int, object] | None = None
        self._is_noted = False
        self.products: Tensor | None = None  # `<E_i, G>` of this rank's share, shape (N,)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: not the experts, which belong to an optimizer."""
        own = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return own | {"products": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def parameter(self) -> nn.Parameter:
        """The linear's own parameter, shape (*S)."""
        parameter = self.linear._parameters.get(self.name)  # quicker than by nn.Module's getattr
        return getattr(self.linear, self.name) if parameter is None else parameter

    def note_gradient(self) -> None:
        """The parameter's gradient was taken as it is fused now, before an optimizer's step."""
        if not self._is_noted:
            assert self._used is not None
            self.weights_of_gradient, self._is_noted = self._used, True

    def have_moved(self) -> None:
        """The experts have taken the gradient that was noted."""
        self._is_noted = False

    def leave(self) -> None:
        """Take the experts and their states away from the optimizer; the model is fused."""
        if (optimizer := self.optimizer) is not None:
            optimizer.state.pop(self.parameter, None)
        self._forget()

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer that has the experts, if one does."""
        return None if self._owner is None else self._owner()

    def turn(
        self,
        optimizer: Optimizer,
        parameter: nn.Parameter,
        group: int | None,
        before: Turn | None,
    ) -> Turn:
        """The parameter's turn in a step.

        Args:
            optimizer: about to step.
            parameter: as the linear has it now.
            group: index of its parameter group that holds the parameter, if one does.
            before: the turn in the step before, which may serve again.
        """
        owner = optimizer if group is not None else self.optimizer
        state = self._own_state if owner is None else owner.state[parameter]
        if before is not None and before.state is state and before.is_of(parameter, group):
            return before
        self._refuse_flat(parameter)
        if EXPERTS not in state:
            experts = self._own_state or {EXPERTS: self.drawn(is_start=True)}
            self._share(state, len(experts[EXPERTS]))
            state |= experts
        if group is not None:
            self._owner = weakref.ref(optimizer)
            self.base = None  # the draws are not needed again
        experts = state[EXPERTS]
        self._refuse_other_experts(experts)
        self._own_state = {EXPERTS: experts}
        return Turn(self, parameter, local(parameter), state, experts, local(experts), group)

    def _refuse_flat(self, parameter: nn.Parameter) -> None:
        if parameter.shape != self.shape:
            raise RuntimeError(
                f"{self.start.name!r} is a part of flat parameters, as under FSDP1, which have no "
                'experts under fuse_on="step". Use FSDP2 (torch.distributed.fsdp.fully_shard), or '
                'wrap with fuse_on="forward".'
            )

    def _refuse_other_experts(self, experts: Tensor) -> None:
        if experts.shape[0] != (count := self.weights.config.num_experts):
            raise ValueError(
                f"The optimizer's state has {len(experts)} experts of {self.start.name!r}, and the "
                f"model is wrapped with {count}. Wrap it with num_experts={len(experts)}."
            )

    def _share(self, state: dict[str, Any], count: int) -> None:
        """Give each expert a copy of the parameter's state, as of Adagrad or of dense training."""
        copies: dict[str, Any] = {}
        for name, value in state.items():
            if not isinstance(value, (Tensor, list, dict)) or getattr(value, "ndim", 1) == 0:
                continue
            if isinstance(value, Tensor) and type(local(value)) is Tensor:
                stack = local(value).expand(count, *local(value).shape).clone()
                copies[name] = as_stack(stack, value)
            else:
                copies[name] = [self._copied(name, value) for _ in range(count)]
        for name, value in copies.items():
            del state[name]
            state[f"{EXPERTS}.{name}"] = value

    def _copied(self, name: str, value: Any) -> Any:
        try:
            return copy.deepcopy(value)
        except NotImplementedError as error:
            raise TypeError(
                f"The optimizer was made before wrap(), and its state {name!r} of "
                f"{self.start.name!r} is a {type(value).__name__}, which cannot be copied for each "
                "expert. Make the optimizer after wrap()."
            ) from error

    def has_stepped(self) -> bool:
        """Whether an optimizer has moved the experts, as far as this process knows."""
        return self._written is not None

    def is_untouched(self) -> bool:
        """Whether the parameter is what `wrap` made of it."""
        if self.base is None:
            return True
        now = self.weights.current_weights()
        draws = self.start.draw(self.base)
        fused = torch.empty_like(self.base)
        fuse_into(fused, draws, now)
        return torch.equal(fused.to(self.parameter), self.parameter.detach())

    def experts(self) -> Tensor:
        """The experts, shape (N, *S), as they are or as they would be drawn."""
        optimizer, parameter = self.optimizer, self.parameter
        if optimizer is not None and EXPERTS in optimizer.state.get(parameter, {}):
            stack: Tensor = optimizer.state[parameter][EXPERTS]
            return stack
        return self._own_state[EXPERTS] if self._own_state else self.drawn()

    @torch.no_grad()
    def drawn(self, *, is_start: bool = False) -> Tensor:
        """New experts, shape (N, *S), which fuse to the parameter, spread as it is."""
        parameter = self.parameter
        base = whole(parameter.detach()) if self.base is None else self.base
        draws = self.start.draw(base)
        part = part_of(draws, parameter).to(local(parameter).device, parameter.dtype)
        del draws
        now = self.weights.current_weights()
        difference = self._difference(local(parameter), part, now)
        if is_start and difference is not None:
            self.weights.starts_around_changed = True
        self._shift(part, difference, now)
        return as_stack(part, parameter)

    def take_writes(self, turn: Turn, now: Tensor) -> None:
        """Add to the experts what was written to the parameter since the last step.

        Args:
            turn: the parameter's.
            now: the group's fusion weights, shape (N,).
        """
        part = turn.part
        if self._written is None or not self._is_fused_from(turn, now):
            self._used = now.clone()
            self._shift(turn.experts, self._difference(part, turn.experts, now), now)
            return
        written = self._written.to(part.device, part.dtype)
        if not _is_known_equal(part, written):
            self._shift(turn.experts, part.to(now.dtype) - written, now)

    def _difference(self, part: Tensor, experts: Tensor, now: Tensor) -> Tensor | None:
        """The parameter less what the experts fuse to; None for nothing."""
        fused = torch.empty_like(part)
        fuse_into(fused, experts, now)
        return None if _is_known_equal(part, fused) else part.to(now.dtype) - fused

    def _shift(self, experts: Tensor, difference: Tensor | None, now: Tensor) -> None:
        if difference is None:
            return
        total = now.sum()
        total = torch.where(total == 0, 1, total)  # an empty bank: they fuse to it as it fills
        experts.add_(difference / total.to(difference))

    def is_fused(self, turn: Turn, now: Tensor) -> None:
        """Remember what the parameter was fused from, and what it is now."""
        part = turn.part
        written = self._written
        if written is None or written.shape != part.shape or written.device != part.device:
            written = self._written = torch.empty_like(part)
        written.copy_(part)
        self._used = now
        versions = None if now.device.type == "cpu" else self._versions()
        self._fused_from = (*turn.identity(), versions)

    def _is_fused_from(self, turn: Turn, now: Tensor) -> bool:
        """Whether experts and fusion weights are those of the last step."""
        if self._fused_from is None or self._fused_from[:2] != turn.identity():
            return False
        if now.device.type == "cpu":
            return self._used is not None and torch.equal(self._used, now)
        return self._versions() == self._fused_from[2]

    def _versions(self) -> list[tuple[int, int]]:
        """Which fusion weights these are; a load in place changes a version."""
        return [(id(tensor), local(tensor)._version) for tensor in self.weights.own_tensors()]


def _is_known_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal; False on a GPU, which would have to be waited for."""
    return one.is_meta or (one.device.type == "cpu" and torch.equal(one, other))
