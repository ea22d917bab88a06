"""The memory bank under `fuse_on="step"`, whose router learns at the optimizer's step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..finding.place import input_of
from ..finding.projections import projection_of
from ..tensors import functional
from ..tensors.readable import is_transformed
from ..tensors.shards import has_nonzero, is_sharded, local, plus
from .memory_bank import MemoryBank
from .votes.votes import mean_of
from .zero_gradients import with_zero_gradient


class BankOnStep(MemoryBank):
    """A memory bank whose group fuses with the bank of the step before.

    A forward keeps, in place of the tokens, the statistics from which the step computes the
    router's gradient (`functional.router_statistics`). They count as votes do.
    """

    _step_total: Tensor | None = None  # of the last step

    def follow_forward(
        self, linear: nn.Module, args: Any, kwargs: Any, output: Any = None
    ) -> Tensor | None:
        """Note the router's output for a micro-batch, with its gradient."""
        if not self.training and self.votes.has_waiting:  # of backwards that no step has applied
            self.still.warn_if_zero(self)
        if not self.training or not isinstance(output, Tensor) or not output.requires_grad:
            return None
        if torch.compiler.is_exporting():  # the program is the dense model's
            return None
        x = local(input_of(args, kwargs))
        if torch.compiler.is_compiling():  # which traces no hook
            return self._followed_by_compiler(x.movedim(self._feature_dim, -1), output)
        if is_transformed(output):
            return None
        self._step_total = None
        if x.numel() == 0:  # no token, no vote
            return with_zero_gradient(output, self._probe())
        noted = self._statistics_of(x.movedim(self._feature_dim, -1))
        self.votes.follow_anchor()
        return with_zero_gradient(output, self._probe(), lambda: self.votes.note(noted))

    def _followed_by_compiler(self, x: Tensor, output: Tensor) -> Tensor:
        if x.numel() == 0:
            return with_zero_gradient(output, self._probe())
        probe = self._probe()
        part = probe.to_local() if is_sharded(probe) else probe
        token = self.votes.token(self._statistics_of(x), part.flatten()[:1])
        return plus(output, token.to(output.dtype))

    def _probe(self) -> nn.Parameter:
        """The parameter with whose gradient votes are noted: the router, unless it is frozen."""
        anchor = self._anchor()
        return self.router if self.router.requires_grad or anchor is None else anchor

    @torch.no_grad()
    def _statistics_of(self, x: Tensor) -> Tensor:
        """The router's statistics of a micro-batch, and behind them 1, one dimension."""
        tokens, mask = self.every(self.config.token_stride, x)
        statistics = functional.router_statistics(tokens, local(self.router), mask)
        return torch.cat([statistics, statistics.new_ones(1)])

    @property
    def _feature_dim(self) -> int:
        projection = projection_of(self.linears[0])
        return -1 if projection is None else projection.feature_dim

    def statistics(self, products: Tensor) -> Tensor:
        """`dL/dw`, shape (N,); the sums of the step's micro-batches, and how many they are."""
        total = self.votes.total if self.votes.total is not None else self._step_total
        if total is None:
            count, features = self.router.shape
            rows = functional.rows_of_statistics(count, features)
            total = products.new_zeros(count + rows * features + 1)
        return torch.cat([products, total.to(products)])

    def gradients(self, sums: Tensor) -> dict[nn.Parameter, Tensor]:
        """The router's gradient from the statistics of the step's tokens."""
        router: nn.Parameter = self.router
        count, features = router.shape
        gradient, total = sums[:count], sums[count:]
        is_known = self.votes.total is None and self._step_total is not None
        self._step_total = total  # for another optimizer's step on the same gradients
        if not is_known:  # also where only other ranks have votes
            self.votes.total = total
        if not router.requires_grad:
            return {}
        pooled = functional.router_gradient(mean_of(total), gradient, features)
        return {router: (1 - self.config.momentum) * pooled}

    def fuses_zeros(self) -> bool:
        """Whether the dense weights are zero, as `wrap` makes them from an empty bank."""
        if not self.is_empty():
            return False
        return not any(has_nonzero(fused.parameter) for fused in self.fused)

    def _has_gradient(self) -> Tensor:
        # Weights that are all zero have gradients of zero.
        return super()._has_gradient() | self.fuses_zeros()

    def _only_experts_have_gradients(self) -> bool:
        gradients = [fused.parameter.grad for fused in self.fused]
        return any(has_nonzero(gradient) for gradient in gradients if gradient is not None)

    def _anchor(self) -> nn.Parameter | None:
        """Not the router, to which autograd gives zeros."""
        for fused in self.fused:
            if (parameter := fused.parameter).requires_grad:
                return parameter
        return None

    def current_weights(self) -> Tensor:
        """The bank, shape (N,), which no forward under "step" moves."""
        return self.numbers
