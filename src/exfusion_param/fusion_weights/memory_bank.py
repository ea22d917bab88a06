"""The memory bank `m` of one FFN group, shape (N,): fusion weights that follow a router."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ExFusionConfig
from ..finding.discovery import FFNGroup
from ..finding.place import PlaceInGroup
from ..finding.projections import projections_of
from ..tensors import functional
from ..tensors.expert_starts import uniform_weights
from ..tensors.ranks import Ranks
from ..tensors.shards import assign, has_nonzero, local
from . import bank_problems
from .empty_banks import StillBank
from .token_pool import TokenPool
from .votes.custom_ops import current_backward
from .votes.ordered_sums import text_of_difference
from .votes.votes import Votes, mean_of
from .zero_gradients import refuse_torch_func


class MemoryBank(TokenPool):
    """`mb`: the running mean `m` of a router's output on the FFN's input (Eq. 10, 11).

    In training `observe` is given the input before the group's linears run, and they fuse with
    `delta m + (1 - delta) w`. The bank itself moves when the optimizer steps (votes/). In eval,
    and outside of a forward, the group fuses with the bank as it is.
    """

    config: ExFusionConfig
    bank: Tensor
    check: Callable[[nn.Module, Any, Any], None] | None = None
    """What looks at the first linear's output; a hook would turn off torch's fast path in eval."""

    def __init__(self, group: FFNGroup, config: ExFusionConfig, seed: int) -> None:
        super().__init__(group, config, seed)
        features = projections_of(self.linears)[0].in_features  # D
        self.router = nn.Parameter(self.new_tensor(config.num_experts, features))  # G
        self.register_buffer("bank", self.new_tensor(config.num_experts))  # m
        self.votes = self._new_votes()
        self.still = StillBank()
        self.is_bypassed = False
        self._thread: int | None = None  # that runs the forward
        self._stepped: Tensor | None = None  # what `health` gives for the step
        self._warned: set[str] = set()
        self.reset_parameters(self.generator(self.bank.device))

    def __getstate__(self) -> dict[str, Any]:
        """The state that a deepcopy includes, without the running forward and waiting votes."""
        return super().__getstate__() | {"votes": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.votes = self._new_votes()

    def _new_votes(self) -> Votes:
        return Votes(self._anchor, self._find_ranks, self.name)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the router as `nn.Linear` does (zero for upcycled experts), empty the bank.

        A zero router gives 1/N, so that an upcycled model is unchanged in training as in eval.
        """
        router = torch.zeros(self.router.shape, dtype=self.router.dtype, device=self.bank.device)
        if self.config.expert_init == "independent":
            bound = 1 / math.sqrt(max(1, router.shape[1]))
            nn.init.uniform_(router, -bound, bound, generator=generator)
        assign(self.router, router)
        start = 1 / self.config.num_experts if self.config.bank_init == "uniform" else 0.0
        nn.init.constant_(self.bank, start)
        self.still.is_filled = False
        self.votes.take()
        self.votes.follow_anchor()

    def forward(self) -> Tensor:
        """In a training forward the moved bank, otherwise the bank, shape (N,)."""
        if not self.training or self.current is None:
            return self.bank
        self._require_own_thread()
        return self.current

    def fuse_stack(self, experts: Tensor) -> Tensor:
        """The fused tensor; warns of an empty bank in eval, unless it is compiled."""
        if not self.training:
            self.still.warn_if_zero(self)
        return super().fuse_stack(experts)

    def start(self) -> Tensor:
        """The bank, whatever it sums to, or 1/N while it is empty, shape (N,)."""
        bank = self.bank
        is_unset = bank.is_meta or self.is_empty()
        return uniform_weights(len(bank), bank.device, bank.dtype) if is_unset else bank

    def run(
        self, linear: nn.Module, x: Tensor, place: PlaceInGroup, run_dense: Callable[[], Any]
    ) -> Any:
        """Observe the group's input before its dense forward."""
        if place.is_first or (place.reads_input and self.current is None):
            self.observe(x.movedim(place.projection.feature_dim, -1))
        else:
            self.require_observed()
        output = run_dense()
        if place.is_first and self.check is not None:
            self.check(linear, (), output)
        return output

    def observe(self, x: Tensor) -> None:
        """Take the FFN's input, shape (..., D), at the start of a forward; ignored in eval."""
        self.current = self._moved_by(x) if self.training else None
        if not (self.training and torch.is_grad_enabled()):
            self.still.watch(self)
        self.remember("_thread", None if torch.compiler.is_compiling() else threading.get_ident())

    def _require_own_thread(self) -> None:
        """Raise if a forward in another thread has observed its input since this one did."""
        if not torch.compiler.is_compiling() and self._thread not in (None, threading.get_ident()):
            raise bank_problems.two_threads(self.group)

    def _moved_by(self, x: Tensor) -> Tensor:
        """Where the FFN's input, shape (..., D), moves the bank, shape (N,)."""
        if self.router.is_meta and not x.is_meta:
            raise bank_problems.offloaded_in_training(self.group)
        counts = torch.is_grad_enabled() and self._anchor() is not None
        if x.numel() == 0:  # no token, no vote; other ranks may have some
            vote, weights = 0.0, self.bank + 0 * self.router.sum(dim=1)  # FSDP2 awaits gradients
        else:
            tokens, mask = self.every(self.config.token_stride, x)
            vote, weights = 1.0, functional.route(tokens, self.router, mask)
            refuse_torch_func(weights, self.group)
        weights = self.votes.mark(weights, vote, counts)
        return functional.update_bank(self.bank, weights, self.config.momentum)

    def require_observed(self) -> None:
        """Raise if a linear of the group trains without the one whose input is routed."""
        if not self.training:
            return
        has_graph = self.current is not None and (
            self.current.requires_grad or not torch.is_grad_enabled() or self._anchor() is None
        )
        if not has_graph:
            raise bank_problems.unobserved(self.group)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemoryBank:
        self.votes.follow(None)  # what it knows of gradients is on another device then
        super()._apply(fn, recurse)
        return self

    def remove_hooks(self) -> None:
        """Leave no hook behind; the group is about to be fused."""
        super().remove_hooks()
        self.votes.follow(None)

    @property
    def numbers(self) -> Tensor:
        """The bank, shape (N,), also where `distribute_module` has replicated it."""
        bank = self._buffers["bank"]  # quicker than by nn.Module's getattr
        assert bank is not None
        return bank.detach() if type(bank) is Tensor else local(bank)

    def is_empty(self) -> bool:
        """Whether the bank is all zeros."""
        return not self.bank.is_meta and not self.numbers.any()

    def fuses_zeros(self) -> bool:
        """Whether the fused weights are zero, as the bank is."""
        return self.is_empty()

    def before_step(self) -> None:
        """Decide which micro-batches the step applies."""
        self.votes.before_step(self._has_gradient)

    def _has_gradient(self) -> Tensor:
        """Whether a gradient of the group is not zero, a boolean of shape ()."""
        gradients = [p.grad for p in [self.router, *self.trained()] if p.grad is not None]
        return torch.stack([has_nonzero(each).to(self.bank.device) for each in gradients]).any()

    def optimizer_stepped(self, skipped: Tensor | None) -> None:
        """Move the bank by the mean of the step's micro-batches, unless the step was skipped."""
        self.end_forward()
        total = self.votes.take()
        if not self.votes.has_counted and (total is None or total[-1] == 0):
            self._warn_if_bypassed()
        if total is None:
            return
        bank = self.numbers
        weights = mean_of(total)[: len(bank)].to(bank)  # under "step" more is behind them
        moved = functional.update_bank(bank, weights, self.config.momentum)
        is_uncounted = (total[-1] == 0).to(bank.device)
        stays = is_uncounted if skipped is None else skipped.to(bank.device) | is_uncounted
        routed = torch.where(stays, bank, weights)
        self._stepped = torch.cat([routed, local(self.router).sum()[None]])
        stays = stays | ~self._stepped.isfinite().all()
        bank.copy_(torch.where(stays, bank, moved))

    def extra_repr(self) -> str:
        """What tells this bank from others."""
        return f"{super().extra_repr()}, momentum={self.config.momentum}"

    def health(self) -> Tensor | None:
        """For `warn_of`: router outputs at the step, whether finite, bank shares, ranks' order."""
        stepped, self._stepped = self._stepped, None
        if stepped is None:
            return None
        differed, self.votes.sums.has_differed = self.votes.sums.has_differed, None
        order = stepped.new_zeros(1) if differed is None else differed[None].to(stepped)
        return torch.cat([stepped, bank_problems.shares_of(self.numbers), order])

    def warn_of(self, health: Tensor) -> None:
        """Warn once if the router chooses a single expert, or an expert is never chosen.

        Raises:
            RuntimeError: ranks on GPUs ran different FFNs at the same time.
        """
        count = (health.shape[0] - 2) // 2
        routed, shares, order = health[:count], health[count + 1 : -1], health[-1]
        if order:
            raise RuntimeError(text_of_difference())
        bank_problems.warn_of_problems(self.group, routed, shares, self._warned)

    def _warn_if_bypassed(self) -> None:
        if self.is_bypassed or self.bank.is_meta or current_backward() is not None:
            return  # within a backward the router's turn comes after the experts'
        if self._only_experts_have_gradients():
            self.is_bypassed = True
            bank_problems.warn_of_bypass(self.group)

    def _only_experts_have_gradients(self) -> bool:
        """No for the zeros that distributed checkpoints step on."""
        router, stacks = self.router.grad, self.expert_stacks()
        experts = [stack.grad for stack in stacks if stack.grad is not None]
        if router is None:
            return bool(experts)
        return any(has_nonzero(each) for each in experts) and not has_nonzero(router)

    def _find_ranks(self) -> Ranks:
        return self.ranks

    def _anchor(self) -> nn.Parameter | None:
        """A parameter of the group that gets a gradient, or None if all are frozen."""
        candidates = [self.router, *self.expert_stacks()]
        return next((tensor for tensor in candidates if tensor.requires_grad), None)
