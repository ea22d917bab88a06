"""The mathematics of gates, as pure functions on tensors.

Symbols: B samples, N experts (k of them are merged), D features. Gates `g`, shape (B, N), sum to
one over the experts. All is computed in float32 at least.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Gates(NamedTuple):
    """The output of a gate.

    Args:
        gates: `g`, shape (B, N); k of them are not zero.
        load: how many samples each expert can expect, differentiable where there is noise; (N,).
    """

    gates: Tensor
    load: Tensor

    @property
    def importance(self) -> Tensor:
        """The importance of each expert over the samples, shape (N,)."""
        return self.gates.sum(dim=0)


def noisy_top_k(logits: Tensor, k: int, deviation: Tensor | None = None) -> Gates:
    """Noisy top-k gating (Shazeer et al., 2017, arXiv 1701.06538, Eq. 3 to 5 and appendix A).

    Args:
        logits: `x W_g`, shape (B, N).
        k: how many experts are kept.
        deviation: of the noise, `softplus(x W_noise)`, shape (B, N); None adds none, as in eval.

    Returns:
        A softmax over the k largest logits, zeros elsewhere.
    """
    noisy = logits if deviation is None else logits + torch.randn_like(logits) * deviation
    largest, index = noisy.topk(min(k + 1, noisy.shape[1]), dim=1)
    kept = torch.zeros_like(noisy).scatter(1, index[:, :k], largest[:, :k].softmax(dim=1))
    if deviation is None or k == noisy.shape[1]:
        return Gates(kept, (kept > 0).to(kept.dtype).sum(dim=0))
    # P(x, i): the probability that expert i is kept under a new draw of its own noise only
    is_kept = torch.zeros_like(noisy).scatter(1, index[:, :k], 1.0) > 0
    threshold = torch.where(is_kept, largest[:, k:], largest[:, k - 1 : k])
    probability = _normal_cdf((logits - threshold) / deviation.clamp(min=1e-12))
    return Gates(kept, probability.sum(dim=0))


def softmax_gates(logits: Tensor) -> Gates:
    """A softmax over all experts (SMEAR, arXiv 2306.03745)."""
    gates = logits.softmax(dim=1)
    return Gates(gates, gates.new_full(gates.shape[1:], len(gates)))


def squared_variation(values: Tensor) -> Tensor:
    """CV^2, the squared coefficient of variation of the last dimension; zero for zeros."""
    mean = values.mean(dim=-1)
    return values.var(dim=-1) / (mean.square() + 1e-10)


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))
