"""The mathematics of ExFusion as pure functions on tensors.

Equation numbers are those of ExFusion (Ruan et al., 2026, arXiv 2603.27965). Symbols: N experts,
`E` the expert stack, `w` the fusion weights, `m` the memory bank, `delta` its momentum, `G` the
router, D the FFN's input features.

All functions compute in float32 at least, whatever autocast says: bfloat16 has 8 bits, and a
fused weight summed in it would lose what the experts differ by. The sum is cast once, at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autocast import without_autocast
from .dtypes import accumulation_dtype
from .expert_sums import fuse_into, products_with


def fuse(experts: Tensor, weights: Tensor) -> Tensor:
    """Fuse an expert stack into one tensor: `W = sum_i w_i E_i` (Eq. 7).

    Args:
        experts: `E`, shape (N, *S), any floating dtype.
        weights: `w`, shape (N,).

    Returns:
        The fused tensor, shape (*S), in the dtype of `experts`.
    """
    dtype = accumulation_dtype(experts.dtype)
    with without_autocast(experts.device):
        weights = weights.to(experts.device, dtype)
        if experts.dtype != dtype and not torch.compiler.is_compiling():
            fused: Tensor = _FuseLowPrecision.apply(experts, weights)
            return fused
        # tensordot is a matrix-vector product over the flat stack: ten times faster on a CPU than
        # a broadcast product and a sum, and its backward keeps no copy of the stack.
        return torch.tensordot(weights, experts.to(dtype), dims=1).to(experts.dtype)


class _FuseLowPrecision(torch.autograd.Function):
    """Keeps no copy of the stack in float32, neither now nor for backward."""

    @staticmethod
    def forward(experts: Tensor, weights: Tensor) -> Tensor:
        fused = experts.new_empty(experts.shape[1:])
        fuse_into(fused, experts, weights)
        return fused

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """`dL/dE_i = w_i G` and `dL/dw_i = <E_i, G>`."""
        experts, weights = ctx.saved_tensors
        of_experts = of_weights = None
        with without_autocast(experts.device):
            if ctx.needs_input_grad[0]:
                factors = weights.view(-1, *[1] * gradient.ndim)
                if torch.is_grad_enabled():  # for second derivatives
                    of_experts = (factors * gradient).to(experts.dtype)
                else:
                    of_experts = torch.mul(factors, gradient, out=torch.empty_like(experts))
            if ctx.needs_input_grad[1]:
                of_weights = products_with(experts, gradient)
        return of_experts, of_weights


def route(x: Tensor, router: Tensor, mask: Tensor | None = None) -> Tensor:
    """The current fusion weights, `w = mean over tokens and samples of softmax(G(x))` (Eq. 10).

    The softmax is taken for each token and the mean after it, which is how the paper reads.

    Args:
        x: input of the FFN, shape (..., D), at least one token.
        router: weight of `G`, shape (N, D).
        mask: shape (...), true or non-zero where a token counts; None counts all, and so does a
            mask that leaves none.

    Returns:
        `w`, shape (N,), summing to one, in float32 or float64.
    """
    with without_autocast(x.device):
        shares = _shares(x, router)
        return shares.mean(dim=0) if mask is None else _token_weights(mask, shares) @ shares


def router_statistics(x: Tensor, router: Tensor, mask: Tensor | None = None) -> Tensor:
    """What a step keeps of the router's inputs instead of the inputs: `w` and `A = mean s_t x_t`.

    Args:
        x: input of the FFN, shape (..., D), at least one token.
        router: weight of `G`, shape (N, D).
        mask: as for `route`.

    Returns:
        `w`, shape (N,), and behind it `A`, shape (N, D), flattened: the means over tokens t of the
        shares `s_t = softmax(G(x_t))` and of their outer products with x_t. Shape (N + N * D,).
    """
    with without_autocast(x.device):
        shares = _shares(x, router)  # (tokens, N)
        tokens = x.reshape(-1, x.shape[-1]).to(shares.dtype)  # (tokens, D)
        if mask is None:
            return torch.cat([shares.sum(dim=0), (shares.mT @ tokens).flatten()]) / len(tokens)
        weighted = shares * _token_weights(mask, shares).unsqueeze(1)
        return torch.cat([weighted.sum(dim=0), (weighted.mT @ tokens).flatten()])


def router_gradient(statistics: Tensor, gradient: Tensor) -> Tensor:
    """The router's gradient from pooled statistics, in place of all tokens.

    The gradient of `w = mean s_t` under `g = dL/dw` is `dL/dG_i = mean s_ti (g_i - <s_t, g>) x_t`.
    With `<w, g>` in place of each token's own `<s_t, g>` it is `(g_i - <w, g>) A_i`. The two are
    equal where all tokens are routed alike.

    Args:
        statistics: of `router_statistics`, shape (N + N * D,).
        gradient: `g`, shape (N,).

    Returns:
        Shape (N, D).
    """
    weights, inputs = statistics[: len(gradient)], statistics[len(gradient) :]
    centered = gradient - weights @ gradient
    return centered.unsqueeze(1) * inputs.view(len(gradient), -1)


def _shares(x: Tensor, router: Tensor) -> Tensor:
    """softmax(G(x)) of each token, shape (tokens, N)."""
    dtype = accumulation_dtype(router.dtype)  # FSDP2 may have cast the router
    tokens = x.reshape(-1, x.shape[-1]).to(dtype)
    logits = router.to(dtype) @ tokens.mT  # (N, tokens): kernels run along the longer dimension
    return logits.softmax(dim=0).mT


def _token_weights(mask: Tensor, shares: Tensor) -> Tensor:
    """What each token counts for in a mean, shape (tokens,)."""
    counts = (mask != 0).flatten().to(shares.dtype)
    counts = torch.where(counts.any(), counts, torch.ones_like(counts))
    return counts / counts.sum()


def update_bank(bank: Tensor, weights: Tensor, momentum: float) -> Tensor:
    """Move the memory bank: `m <- delta m + (1 - delta) w` (Eq. 11).

    Args:
        bank: `m`, shape (N,).
        weights: the current `w`, shape (N,).
        momentum: `delta`.

    Returns:
        The new bank, shape (N,). The gradient flows into `weights`.
    """
    return momentum * bank + (1 - momentum) * weights
