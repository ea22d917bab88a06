"""ExFusion written like the paper, to compare with: experts as linears, their outputs summed.

Nothing here is shared with the package. Every expert is a linear of its own, all of them run, and
the weighted sum is taken over outputs (the left-hand side of Eq. 7) instead of weights.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from exfusion_param import ExFusionConfig


class ReferenceFFN(nn.Module):
    """The FFN of Eq. 8 (`sw`), Eq. 9 (`dw`), or Eq. 10 and 11 (`mb`).

    Args:
        wrapped: the wrapped `Mlp` whose experts, fusion weights and activation to copy.
        config: the settings that it was wrapped with.
    """

    def __init__(self, wrapped: nn.Module, config: ExFusionConfig) -> None:
        super().__init__()
        self.config = config
        linears = (wrapped.fc1, wrapped.fc2)
        self.experts = nn.ModuleList(nn.ModuleList(_experts(linear)) for linear in linears)
        self.act = wrapped.act
        owners = [linear.parametrizations.weight[0].fusion_weights for linear in linears]
        if config.variant == "dw":
            self.weights = nn.Parameter(owners[0].weights.detach().clone())
        if config.variant == "mb":
            if config.shared_router:
                del owners[1]
            self.routers = nn.ModuleList(map(_router, owners))
            self.banks = [owner.bank.clone() for owner in owners]
            self.seen: list[list[Tensor]] = [[] for _ in owners]

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        weights = self.fusion_weights(0, x)
        h = self.act(_weighted(weights, self.experts[0], x))
        if self.config.variant == "mb" and not self.config.shared_router:
            weights = self.fusion_weights(1, h)
        return _weighted(weights, self.experts[1], h)

    def fusion_weights(self, which: int, x: Tensor) -> Tensor:
        """W of Eq. 8 or 9, or the new m of Eq. 11."""
        n = self.config.num_experts
        if self.config.variant == "sw":
            return torch.full((n,), 1 / n, dtype=x.dtype)
        if self.config.variant == "dw":
            return self.weights
        if not self.training:
            return self.banks[which]
        tokens = x[..., :: self.config.token_stride, :].reshape(-1, x.shape[-1])
        current = sum(torch.softmax(self.routers[which](t), 0) for t in tokens) / len(tokens)
        self.seen[which].append(current.detach())
        delta = self.config.momentum
        return delta * self.banks[which] + (1 - delta) * current

    def step(self) -> None:
        """The optimizer has stepped: move the bank by the mean over its micro-batches."""
        if self.config.variant != "mb":
            return
        delta = self.config.momentum
        for which, seen in enumerate(self.seen):
            mean = sum(seen) / len(seen)
            self.banks[which] = delta * self.banks[which] + (1 - delta) * mean
            seen.clear()


def reference_of(wrapped: nn.Module, config: ExFusionConfig) -> nn.Module:
    """A model of `models.FFNs` whose FFNs are the paper's, from a wrapped one."""
    reference = copy.deepcopy(wrapped)
    reference.blocks = nn.ModuleList(ReferenceFFN(block, config) for block in wrapped.blocks)
    return reference


def _experts(linear: nn.Module) -> list[nn.Linear]:
    weights = linear.parametrizations.weight.original.detach()
    has_bias = linear.bias is not None
    experts = []
    for i, weight in enumerate(weights):
        expert = nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias, dtype=weight.dtype)
        expert.weight = nn.Parameter(weight.clone())
        if has_bias:
            bias = linear.parametrizations.bias.original.detach()[i]
            expert.bias = nn.Parameter(bias.clone())
        experts.append(expert)
    return experts


def _router(weights: nn.Module) -> nn.Linear:
    n, d = weights.router.shape
    router = nn.Linear(d, n, bias=False, dtype=weights.router.dtype)
    router.weight = nn.Parameter(weights.router.detach().clone())
    return router


def _weighted(weights: Tensor, experts: Sequence[nn.Module], x: Tensor) -> Tensor:
    return sum(w * expert(x) for w, expert in zip(weights, experts, strict=True))
