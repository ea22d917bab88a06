"""A weight or bias of a wrapped linear under `fuse_on="step"`, and the experts it is fused from."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..fusion_weights.base import FusionWeights
from ..tensors.expert_starts import ExpertStart
from ..tensors.shards import as_stack, full_tensor, local, part_of
from ..tensors.sliced_sums import fuse_into
from .writes import Writes, difference, shift

EXPERTS = "experts"
"""The key of the expert stack in an optimizer's state of a parameter."""

_NOTED = "_exfusion_noted"
"""The attribute of a gradient whose fusion weights are known."""


class FusedParameter:
    """A parameter of a dense linear whose value is fused at each step.

    Args:
        fusion_weights: the group's fusion weights.
        linear: the module that holds the parameter.
        name: "weight" or "bias".
        start: how its experts are drawn.
        base: the tensor around which they are drawn; None takes the parameter as it is then.
    """

    def __init__(
        self,
        fusion_weights: FusionWeights,
        linear: nn.Module,
        name: str,
        start: ExpertStart,
        base: Tensor | None,
    ) -> None:
        self.fusion_weights = fusion_weights
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
        self.own_state: dict[str, Any] = {}
        """The experts, for the next optimizer if this one is deleted or its state reset."""
        self.writes = Writes(self.fusion_weights)
        self.is_stepping = False
        """The optimizer that holds the parameter is within its step."""
        self.products: Tensor | None = None  # `<E_i, G>` of this rank's share, shape (N,)

    def __getstate__(self) -> dict[str, Any]:
        """The state that a copy or a pickle includes, without experts, which optimizers hold."""
        kept = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return kept | {"products": None, "writes": None, "own_state": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def parameter(self) -> nn.Parameter:
        """The linear's own parameter, shape (*S)."""
        parameter = self.linear._parameters.get(self.name)  # quicker than by nn.Module's getattr
        return getattr(self.linear, self.name) if parameter is None else parameter

    def note_gradient(self, gradient: Tensor) -> None:
        """This gradient was taken as the parameter is fused now, before an optimizer's step."""
        if not hasattr(gradient, _NOTED):
            assert self.writes.fused_with is not None
            self.weights_of_gradient = self.writes.fused_with
            setattr(gradient, _NOTED, True)

    def note_applied(self, gradient: Tensor) -> None:
        """The experts have moved by it; what is added to it from now on is another gradient."""
        if hasattr(gradient, _NOTED):
            delattr(gradient, _NOTED)

    def remove_experts(self) -> None:
        """Take the experts and their states away from the optimizer; the model is fused."""
        if (optimizer := self.optimizer) is not None:
            optimizer.state.pop(self.parameter, None)
        self._forget()

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer that has the experts, if one does."""
        return None if self._owner is None else self._owner()

    def set_optimizer(self, optimizer: Optimizer) -> None:
        """The experts are in this optimizer's state from now on."""
        self._owner = weakref.ref(optimizer)
        self.base = None  # the draws are not needed again

    def keep(self, experts: Tensor) -> None:
        """Keep experts alive that are in an optimizer's state; another one may come.

        Raises:
            ValueError: they are not as many as the model is wrapped with.
        """
        if experts.shape[0] != (count := self.fusion_weights.config.num_experts):
            raise ValueError(
                f"The optimizer's state has {len(experts)} experts of {self.start.name!r}, and the "
                f"model is wrapped with {count}. Wrap it with num_experts={len(experts)}."
            )
        self.own_state[EXPERTS] = experts

    def refuse_flat(self) -> None:
        """Raise for the flat parameters of FSDP1."""
        if self.parameter.shape != self.shape:
            raise RuntimeError(
                f"{self.start.name!r} is a part of flat parameters, as under FSDP1, which have no "
                'experts under fuse_on="step". Use FSDP2 (torch.distributed.fsdp.fully_shard), or '
                'wrap with fuse_on="forward".'
            )

    def require_own(self) -> None:
        """Raise if the tensor was taken from the linear's parameters, by weight_norm for one."""
        if self.name not in self.linear._parameters:
            raise RuntimeError(
                f"{self.start.name!r} is not a parameter of its linear any more: weight_norm, "
                "spectral_norm, pruning or the like, applied after wrap(), computes it from other "
                "tensors, which have no experts. Undo that, by parametrize."
                f"remove_parametrizations(linear, {self.name!r}), remove_weight_norm, "
                "remove_spectral_norm or prune.remove, and apply it after fuse(model); or leave "
                "the linear out, wrap(model, filter_fn=...)."
            )

    def has_stepped(self) -> bool:
        """Whether an optimizer has moved the experts, as far as this process knows."""
        return self.writes.recorded is not None

    def is_untouched(self) -> bool:
        """Whether the parameter is what `wrap` made of it."""
        if self.base is None:
            return True
        now = self.fusion_weights.current_weights()
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
        return self.own_state[EXPERTS] if self.own_state else self.drawn()

    @torch.no_grad()
    def drawn(self, *, is_start: bool = False) -> Tensor:
        """New experts, shape (N, *S), which fuse to the parameter, spread as it is."""
        parameter = self.parameter
        base = full_tensor(parameter.detach()) if self.base is None else self.base
        draws = self.start.draw(base)
        part = part_of(draws, parameter).to(local(parameter).device, parameter.dtype)
        del draws
        now = self.fusion_weights.current_weights()
        change = difference(local(parameter), part, now)
        if is_start and change is not None:
            self.fusion_weights.starts_around_changed = True
        shift(part, change, now)
        return as_stack(part, parameter)
