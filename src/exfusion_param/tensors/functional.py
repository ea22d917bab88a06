"""The mathematics of ExFusion as pure functions on tensors.

Equation numbers are those of ExFusion (Ruan et al., 2026, arXiv 2603.27965). Symbols: N experts,
`E` the expert stack, `w` the fusion weights, `m` the memory bank, `delta` its momentum, `G` the
router, D the FFN's input features.

All functions compute in float32 at least, whatever autocast says: bfloat16 has 8 bits, and a
fused weight summed in it would lose what the experts differ by. The sum is cast once, at the end.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .precision import accumulation_dtype, without_autocast
from .shards import is_sharded, replicated
from .sliced_sums import fuse_into, products_with


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
        if is_sharded(experts):  # between forwards, in which FSDP2 has the whole stack
            weights = replicated(weights, experts)
        elif experts.dtype != dtype and not torch.compiler.is_compiling():
            return _FuseLowPrecision.apply(experts, weights)
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
        shares = token_shares(x, router)
        return shares.mean(dim=0) if mask is None else _token_weights(mask, shares) @ shares


EXACT_ROUTER_STATISTICS = 1 << 18
"""The largest N^2 D of a router whose gradient at the optimizer's step is exact."""


def is_exact(num_experts: int, features: int) -> bool:
    """Whether `router_gradient` is exact for a router of shape (N, D), or an approximation."""
    return num_experts**2 * features <= EXACT_ROUTER_STATISTICS


def rows_of_statistics(num_experts: int, features: int) -> int:
    """How many means of products with the inputs `router_statistics` takes, each of shape (D,)."""
    return math.comb(num_experts, 2) if is_exact(num_experts, features) else num_experts


def router_statistics(x: Tensor, router: Tensor, mask: Tensor | None = None) -> Tensor:
    """Statistics of the router's inputs that a step keeps instead of the inputs themselves.

    Args:
        x: input of the FFN, shape (..., D), at least one token.
        router: weight of `G`, shape (N, D).
        mask: as for `route`.

    Returns:
        `w`, the mean over tokens t of the shares `s_t = softmax(G(x_t))`, shape (N,), followed by
        means of products with the inputs, flattened: `B_ij = mean s_ti s_tj x_t` for i < j, shape
        (N (N - 1) / 2, D), where `is_exact`; otherwise `A_i = mean s_ti x_t`, shape (N, D).
    """
    with without_autocast(x.device):
        shares = token_shares(x, router).mT  # (N, tokens)
        tokens = x.reshape(-1, x.shape[-1]).to(shares.dtype)  # (tokens, D)
        factors = shares
        if is_exact(*router.shape):
            i, j = torch.triu_indices(len(router), len(router), offset=1, device=x.device)
            factors = shares[i] * shares[j]  # (pairs, tokens)
        if mask is None:
            sums = torch.cat([shares.sum(dim=1), (factors @ tokens).flatten()])
            return sums / len(tokens)
        weights = _token_weights(mask, shares)
        return torch.cat([shares @ weights, ((factors * weights) @ tokens).flatten()])


def router_gradient(statistics: Tensor, gradient: Tensor, features: int) -> Tensor:
    """The router's gradient from statistics over all tokens of a step.

    The gradient of `w = mean s_t` under `g = dL/dw` is `dL/dG_i = mean s_ti (g_i - <s_t, g>) x_t`,
    which is `sum_j (g_i - g_j) B_ij`. For large routers, the statistics hold `A` only, and each
    token's own `<s_t, g>` is replaced by `<w, g>`: `(g_i - <w, g>) A_i`, which is equal where all
    tokens are routed alike.

    Args:
        statistics: of `router_statistics`.
        gradient: `g`, shape (N,).
        features: D.

    Returns:
        Shape (N, D).
    """
    count = len(gradient)
    rows = rows_of_statistics(count, features)
    weights, inputs = statistics[:count], statistics[count:].view(rows, features)
    if not is_exact(count, features):
        return (gradient - weights @ gradient).unsqueeze(1) * inputs
    i, j = torch.triu_indices(count, count, offset=1, device=statistics.device)
    moves = (gradient[i] - gradient[j]).unsqueeze(1) * inputs  # (pairs, D)
    zeros = inputs.new_zeros(count, features)
    return zeros.index_add(0, i, moves).index_add(0, j, moves, alpha=-1)


def token_shares(x: Tensor, router: Tensor) -> Tensor:
    """softmax(G(x)) of each token, shape (tokens, N)."""
    dtype = accumulation_dtype(router.dtype)  # FSDP2 may have cast the router
    tokens = x.reshape(-1, x.shape[-1]).to(dtype)
    logits = router.to(dtype) @ tokens.mT  # (N, tokens): kernels run along the longer dimension
    return logits.softmax(dim=0).mT


def _token_weights(mask: Tensor, shares: Tensor) -> Tensor:
    """The factor of each token in a mean, shape (tokens,)."""
    counts = (mask != 0).flatten().to(shares.dtype)
    counts = torch.where(counts.any(), counts, torch.ones_like(counts))
    return counts / counts.sum()


def update_bank(bank: Tensor, weights: Tensor, momentum: float) -> Tensor:
    """Move the memory bank: `m <- delta m + (1 - delta) w` (Eq. 10).

    Args:
        bank: `m`, shape (N,).
        weights: the current `w`, shape (N,).
        momentum: `delta`.

    Returns:
        The new bank, shape (N,). The gradient flows into `weights`.
    """
    return momentum * bank + (1 - momentum) * weights
