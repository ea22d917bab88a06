"""The fusion weights `w` of one FFN group, shape (N,): static, learned, or a memory bank.

One module serves all linears of the group. It belongs to the weight parametrization of the first,
so that it appears once in `state_dict()` and goes with `remove_parametrizations`. Its tensors stay
in float32 at least, also in a bfloat16 model: a bank moves by less than bfloat16 resolves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import functional, step_hooks
from .config import ExFusionConfig
from .pending import PendingMean

Linears = tuple[nn.Module, ...]


class FusionWeights(nn.Module):
    """What all variants share. Calling the module gives the `w` to fuse with now.

    Args:
        group: name of the FFN group, its FFN's name in the model.
        config: the settings of the parametrization.
        linears: the linears that fuse with these weights.
    """

    linears: Linears

    def __init__(self, group: str, config: ExFusionConfig, linears: Linears) -> None:
        super().__init__()
        self.group = group
        self.config = config
        self.handles: list[RemovableHandle] = []  # of hooks that serve this group
        # Kept out of the submodules: the linears own this module, not the reverse.
        self.__dict__["linears"] = linears
        step_hooks.watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:  # deepcopy ends here
        super().__setstate__(state)
        step_hooks.watch(self)

    def forward(self) -> Tensor:
        """The fusion weights to fuse with now, shape (N,)."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Start anew, as `wrap` does."""

    def start(self) -> Tensor:
        """The weights that upcycled experts are to fuse under, shape (N,), of non-zero sum."""
        return self()

    def optimizer_stepped(self, skipped: Tensor | None) -> None:
        """An optimizer of the group's parameters has stepped.

        Args:
            skipped: a boolean, shape (), on the device, if the optimizer's own kernel may have
                skipped the step because a GradScaler found an overflow.
        """

    def release(self) -> None:
        """The group's forward is over."""

    def retire(self) -> None:
        """Leave no hook behind; the group is about to be fused."""
        self.release()
        for handle in self.handles:
            handle.remove()

    def is_empty(self) -> bool:
        """Whether all fusion weights are zero, as in a bank before its first move."""
        return False

    def expert_stacks(self) -> Iterator[nn.Parameter]:
        """The expert stacks that fuse with these weights."""
        for linear in self.linears:
            for fusions in getattr(linear, "parametrizations", {}).values():
                yield fusions.original

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusionWeights:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_low = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if is_low else moved

        super()._apply(keep_precision, recurse)
        return self


class StaticWeights(FusionWeights):
    """`sw`: `w_i = 1/N`, fixed (Eq. 8)."""

    def forward(self) -> Tensor:
        """1/N, shape (N,)."""
        stack = next(self.expert_stacks())
        # Made anew each time: a constant buffer would come back from the meta device unset.
        dtype = functional.accumulation_dtype(stack.dtype)
        return uniform_weights(self.config.num_experts, stack.device, dtype)


class LearnedWeights(FusionWeights):
    """`dw`: one learned vector for the whole group, from 1/N on, without softmax (Eq. 9)."""

    def __init__(
        self,
        group: str,
        config: ExFusionConfig,
        linears: Linears,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(group, config, linears)
        self.weights = nn.Parameter(uniform_weights(config.num_experts, device, dtype))

    def reset_parameters(self) -> None:
        """Set the weights to 1/N."""
        nn.init.constant_(self.weights, 1 / self.config.num_experts)

    def forward(self) -> Tensor:
        """The learned vector, shape (N,)."""
        return self.weights


class MemoryBank(FusionWeights):
    """`mb`: the running mean `m` of a router's output on the FFN's input (Eq. 10, 11).

    In training `observe` is given the input before the group's linears run, and they fuse with
    `delta m + (1 - delta) w`. The bank itself moves when the optimizer steps (pending.py). In eval,
    and outside of a forward, the group fuses with the bank as it is.

    Args:
        group: name of the FFN group.
        config: the settings of the parametrization.
        linears: the linears that fuse with these weights.
        in_features: D, features of the FFN's input.
        device: where the router and the bank live.
        dtype: float32 or float64.
        generator: draws the router; None takes torch's global one.
    """

    bank: Tensor

    def __init__(
        self,
        group: str,
        config: ExFusionConfig,
        linears: Linears,
        *,
        in_features: int,
        device: torch.device,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(group, config, linears)
        shape = (config.num_experts, in_features)
        self.router = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))  # G
        self.register_buffer("bank", torch.empty(shape[0], device=device, dtype=dtype))  # m
        self.pending = PendingMean()
        self.current: Tensor | None = None
        self.reset_parameters(generator)

    def __getstate__(self) -> dict[str, Any]:
        """What a deepcopy takes along: all but the running forward's graph."""
        return self.__dict__ | {"current": None}

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the router as `nn.Linear` does (zero for upcycled experts), empty the bank.

        A zero router gives 1/N, so that an upcycled model is unchanged in training as in eval.
        """
        if self.config.expert_init == "upcycle":
            nn.init.zeros_(self.router)
        else:
            bound = 1 / math.sqrt(self.router.shape[1])
            nn.init.uniform_(self.router, -bound, bound, generator=generator)
        start = 1 / self.config.num_experts if self.config.bank_init == "uniform" else 0.0
        nn.init.constant_(self.bank, start)
        self.pending.take()
        self.pending.follow(self._anchor())

    def forward(self) -> Tensor:
        """In a training forward the moved bank, otherwise the bank, shape (N,)."""
        return self.bank if self.current is None else self.current

    def start(self) -> Tensor:
        """The bank scaled to sum one, or 1/N while it is empty, shape (N,)."""
        bank = self.bank
        if bank.is_meta or self.is_empty():
            return uniform_weights(len(bank), bank.device, bank.dtype)
        return bank / bank.sum()

    def observe(self, x: Tensor) -> None:
        """Take the FFN's input, shape (..., D), at the start of a forward; ignored in eval."""
        if not self.training:
            return
        if x.numel() == 0:  # no token, no vote
            self.current = self.bank
            return
        weights = functional.route(x, self.router)
        anchor = self._anchor()
        if torch.is_grad_enabled() and anchor is not None:
            if not torch.compiler.is_compiling():  # a hook on a parameter cannot be traced
                self.pending.follow(anchor)
            weights = self.pending.mark(weights)
        self.current = functional.update_bank(self.bank, weights, self.config.momentum)

    def require_observed(self) -> None:
        """Raise if a linear of the group runs in training before the one whose input is routed."""
        if self.training and self.current is None:
            raise RuntimeError(
                f"A linear of {self.group!r} ran before the one whose input its shared router "
                "reads. Give each linear a router of its own: wrap(model, shared_router=False)."
            )

    def release(self) -> None:
        """The group's forward is over."""
        self.current = None

    def retire(self) -> None:
        """Leave no hook behind; the group is about to be fused."""
        super().retire()
        self.pending.follow(None)

    def is_empty(self) -> bool:
        """Whether the bank is all zeros."""
        return not self.bank.is_meta and not self.bank.any()

    @torch.no_grad()
    def optimizer_stepped(self, skipped: Tensor | None) -> None:
        """Move the bank by the mean of the step's micro-batches, unless the step was skipped."""
        self.release()
        self.pending.follow(self._anchor())
        weights = self.pending.take()
        if weights is None:
            return
        moved = functional.update_bank(self.bank, weights, self.config.momentum)
        self.bank.copy_(moved if skipped is None else torch.where(skipped, self.bank, moved))

    def _anchor(self) -> nn.Parameter | None:
        """A trainable parameter of the group, or None if all are frozen."""
        candidates = itertools.chain([self.router], self.expert_stacks())
        return next((tensor for tensor in candidates if tensor.requires_grad), None)


def uniform_weights(num_experts: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """1/N for each of N experts, shape (N,)."""
    return torch.full((num_experts,), 1 / num_experts, device=device, dtype=dtype)
