"""`displacement="shared"`: frozen starting values, and one displacement that all experts share.

Under AdamW all experts of a stack move almost alike: their gradients are multiples `w_i G` of one,
and AdamW divides the factors out. So an expert is `E_i = c A_i + D` here, with its starting value
`A_i`, frozen and in bfloat16, one displacement `D` for all experts, and what weight decay has left
of the starting values, the number `c`. Then

    W = (sum_i w_i) D + c sum_i w_i A_i,   dL/dD = (sum_i w_i) G,   dL/dw_i = c <A_i, G> + <D, G>.

Cost: weights, gradient and optimizer states are those of one dense tensor for any N, plus 2 bytes
for each number of the stack, and two passes over these in each step; one under static weights.

It is exact for an optimizer that gives every expert the same update, and for AdamW under static
weights, but for N times its `eps`. Weight decay has to be decoupled, as AdamW's is:
`p -= lr * weight_decay * p`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .dtypes import accumulation_dtype
from .expert_sums import fuse_into
from .fused_leaf import FusedLeaf
from .fusion_weights import FusionWeights, uniform_weights
from .shards import assign, like, local

FROZEN = torch.bfloat16


class SharedDisplacement(FusedLeaf):
    """The parametrization of one stack whose experts move together.

    Args:
        fusion_weights: the group's fusion weights.
        experts: the stack to start with, shape (N, *S).
        owns_weights: whether the fusion weights are this module's child.
    """

    def __init__(self, fusion_weights: FusionWeights, experts: Tensor, owns_weights: bool) -> None:
        super().__init__(fusion_weights, experts, owns_weights)
        self.displacement = nn.Parameter(torch.zeros_like(self.fused))  # D, (*S)
        dtype = accumulation_dtype(experts.dtype)
        ones = torch.ones((), dtype=dtype, device=experts.device)
        # A parameter, as averages of weights take those alone; no gradient ever reaches it.
        self.decay = nn.Parameter(ones, requires_grad=False)  # c

    def stored(self, stack: nn.Parameter) -> nn.Parameter:
        """The stack that this module was registered with, shape (N, *S), as starting values."""
        dtype = accumulation_dtype(stack.dtype)
        weights = uniform_weights(len(stack), stack.device, dtype)
        return nn.Parameter(self._split(stack.detach(), weights), requires_grad=False)

    @torch.no_grad()
    def start_from(self, stack: Tensor, experts: Tensor) -> None:
        """Start anew from whole experts, shape (N, *S)."""
        assign(stack, self._split(experts, self.fusion_weights.start()))

    def moved(self, experts: Tensor) -> nn.Parameter:
        """What an optimizer moves."""
        return self.displacement

    def experts(self, stack: Tensor) -> Tensor:
        """This rank's part of the experts as they are, shape (N, *S)."""
        part = local(self.displacement)
        return local(stack).to(part.dtype) * self.decay.to(part) + part

    def hide_gradient(self, experts: nn.Parameter, is_retry: bool) -> None:
        """Take the leaf's gradient off it, and give the displacement its own."""
        super().hide_gradient(experts, is_retry)
        if self.hidden_gradient is not None and self.displacement.requires_grad:
            part = local(self.hidden_gradient)
            self.displacement.grad = like(
                self.displacement, part * self.weights_of_gradient.sum().to(part)
            )

    def settle(self, experts: nn.Parameter) -> None:
        """An optimizer's step is over."""
        super().settle(experts)
        self.displacement.grad = None

    @torch.no_grad()
    def decay_experts(self, factor: float | Tensor) -> None:
        """Decay the starting values as the optimizer has decayed the displacement."""
        if isinstance(factor, Tensor):
            factor = factor.to(self.decay)
        self.decay.mul_(factor)

    @torch.no_grad()
    def inner_products(self, experts: Tensor) -> Tensor:
        """`<E_i, G>` of this rank's part of experts and gradient, shape (N,)."""
        assert self.leaf.grad is not None
        gradient, displacement = local(self.leaf.grad), local(self.displacement)
        dtype = accumulation_dtype(gradient.dtype)
        common = displacement.flatten().to(dtype) @ gradient.flatten().to(dtype)
        products = super().inner_products(experts)
        return products * self.decay.to(products) + common

    def sources(self, experts: Tensor) -> list[Tensor]:
        """Starting values, displacement and decay."""
        return [experts, self.displacement, self.decay]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedDisplacement:
        """As ever, but for the decay, which bfloat16 would not resolve."""
        decay = self.decay.detach()
        super()._apply(fn, recurse)
        if not decay.is_meta:
            self.decay.data = decay.to(self.decay.device)
        return self

    def give_gradient(self, experts: nn.Parameter) -> bool:
        """No gradient for starting values, also where a user has thawed all parameters."""
        return False

    def _fuse(self, experts: Tensor, weights: Tensor, out: Tensor) -> None:
        total = torch.empty_like(out, dtype=accumulation_dtype(out.dtype))
        fuse_into(total, experts, weights)
        shared = local(self.displacement) * weights.sum().to(total)
        out.copy_(total.mul_(self.decay.to(total)).add_(shared))

    def _as_stored(self, experts: Tensor) -> Tensor:
        return super()._as_stored(self._split(experts, self.fusion_weights.start()))

    def _split(self, experts: Tensor, weights: Tensor) -> Tensor:
        """Start from `experts`; their starting values in bfloat16."""
        frozen = experts.to(FROZEN)
        rounding = torch.empty_like(experts[0], dtype=weights.dtype)
        fuse_into(rounding, experts - frozen.to(experts.dtype), weights)
        with torch.no_grad():
            assign(self.displacement, (rounding / weights.sum()).to(self.displacement.dtype))
            self.decay.fill_(1)
        return frozen
