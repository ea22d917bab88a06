"""A linear whose weight is merged again for each sample: `y_b = x_b (sum_i g_bi W_i)^T`.

Two ways give the same numbers. To merge weights costs a weight of its own for each sample; to
combine the outputs of all experts costs N products for each token, which is less where a sample has
few tokens. `merged_linear` takes the cheaper one.

Note [Tiles of merged weights]
The merged weights of a batch are as large as B dense weights. They are never there as a whole: some
rows of all experts are merged at a time, for all samples, used while they are in the cache, and not
kept; backward merges them again. With `G_b = dL/dW_b` the gradients are `dL/dW_i = sum_b g_bi G_b`
and `dL/dg_bi = <W_i, G_b>`, both one matrix product for the rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..tensors.precision import accumulation_dtype, autocast_dtype, without_autocast

TILE = {"cpu": 1 << 20}
"""Numbers in a tile of merged weights, by the type of the device; one row may have more."""
LARGE_TILE = 1 << 26
"""Numbers in a tile on all other devices, and in compiled code."""

MERGED_WEIGHT_COST = 40
"""Writing and reading a merged weight, in the time of this many products with it."""


def merged_linear(
    x: Tensor,
    gates: Tensor,
    experts: Tensor,
    bias: Tensor | None = None,
    *,
    kept: int,
    is_transposed: bool = False,
) -> Tensor:
    """A linear with a weight and bias of its own for each sample.

    Args:
        x: shape (B, T, in).
        gates: `g`, shape (B, N).
        experts: shape (N, out, in), or (N, in, out) if transposed.
        bias: shape (N, out).
        kept: how many gates of a sample are not zero.
        is_transposed: as the weight of GPT-2's Conv1D is.

    Returns:
        Shape (B, T, out), in the dtype of x, or that of autocast where it is on.
    """
    x = x.to(autocast_dtype(x.device) or x.dtype)
    with without_autocast(x.device):
        gates = gates.to(x.device, accumulation_dtype(experts.dtype))
        if combines_outputs(x.shape[1], len(experts)):
            y = combined_outputs(x, gates, experts, is_transposed)
        else:
            y = _Merged.apply(x, gates, experts, kept, is_transposed)
        if bias is None:
            return y
        return y + (gates @ bias.to(gates.dtype)).to(y.dtype).unsqueeze(1)


def combines_outputs(tokens: int, num_experts: int) -> bool:
    """Whether samples of so many tokens are cheaper with the outputs of all experts."""
    return tokens * num_experts < num_experts + tokens + MERGED_WEIGHT_COST


def combined_outputs(x: Tensor, gates: Tensor, experts: Tensor, is_transposed: bool) -> Tensor:
    """The gated sum of the experts' outputs; shapes as for `merged_linear`."""
    spec = "bti,nio->btno" if is_transposed else "bti,noi->btno"
    outputs = torch.einsum(spec, x, experts.to(x.dtype))
    return torch.einsum("bn,btno->bto", gates, outputs.to(gates.dtype)).to(x.dtype)


def merged_weights(gates: Tensor, experts: Tensor, kept: int) -> Tensor:
    """`sum_i g_bi W_i`, shape (B, *S), in the gates' dtype; gates are (B, N), experts (N, *S)."""
    flat = experts.flatten(1)
    if 3 * kept * len(gates) < len(experts):  # to copy these is less than to read all
        values, index = gates.topk(kept, dim=1)
        chosen = flat[index].to(gates.dtype)  # (B, kept, numbers of an expert)
        weights = torch.bmm(values.unsqueeze(1), chosen)
    else:
        weights = gates @ flat.to(gates.dtype)
    return weights.view(len(gates), *experts.shape[1:])


class _Merged(torch.autograd.Function):
    """The product with `merged_weights`, see Note [Tiles of merged weights]."""

    @staticmethod
    def forward(
        x: Tensor, gates: Tensor, experts: Tensor, kept: int, is_transposed: bool
    ) -> Tensor:
        parts = []
        for rows in _tiles(len(x), experts):
            weights = merged_weights(gates, experts[:, rows], kept).to(x.dtype)
            parts.append(
                torch.bmm(x[..., rows], weights) if is_transposed else torch.bmm(x, weights.mT)
            )
        return _sum(parts) if is_transposed else torch.cat(parts, dim=-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, gates, experts, ctx.kept, ctx.is_transposed = inputs
        ctx.save_for_backward(x, gates, experts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Of x, gates and experts; differentiable again."""
        x, gates, experts = ctx.saved_tensors
        needs_x, needs_gates, needs_experts, *_ = ctx.needs_input_grad
        of_x, of_gates, of_experts = [], [], []
        with without_autocast(x.device):
            for rows in _tiles(len(x), experts):
                tile = experts[:, rows]
                if needs_x:
                    weights = merged_weights(gates, tile, ctx.kept).to(x.dtype)
                    of_x.append(
                        torch.bmm(gradient, weights.mT)
                        if ctx.is_transposed
                        else torch.bmm(gradient[..., rows], weights)
                    )
                if not (needs_gates or needs_experts):
                    continue
                factors = (
                    (x[..., rows], gradient) if ctx.is_transposed else (gradient[..., rows], x)
                )
                of_tile = torch.bmm(factors[0].mT, factors[1]).flatten(1).to(gates.dtype)
                if needs_gates:
                    of_gates.append(of_tile @ tile.flatten(1).to(gates.dtype).mT)
                if needs_experts:
                    of_experts.append((gates.mT @ of_tile).view(tile.shape).to(experts.dtype))
        if of_x:
            joined = torch.cat(of_x, dim=-1) if ctx.is_transposed else _sum(of_x)
        return (
            joined if of_x else None,
            _sum(of_gates) if of_gates else None,
            torch.cat(of_experts, dim=1) if of_experts else None,
            None,
            None,
        )


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _tiles(samples: int, experts: Tensor) -> Iterator[slice]:
    """Rows whose merged weights are small enough to be there together; at least one tile."""
    size = TILE.get(experts.device.type, LARGE_TILE)
    if torch.compiler.is_compiling():  # which would unroll them
        size = LARGE_TILE
    rows, columns = experts.shape[1:]
    count = max(1, size // max(1, samples * columns))
    for start in range(0, max(1, rows), count):
        yield slice(start, start + count)
