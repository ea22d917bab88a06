"""The FFNs of S models at once: the equations of each arm with one more dimension in front.

Weights have the names that the package gives them. An FFN maps tokens (S, rows, features) to the
same, and returns beside them (S, N) what its memory bank becomes, or (S,) how uneven a mixture is.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from support.diversity import NOISE, SHARE

Weights = dict[str, Tensor]
"""Of one block, by their names within it."""
FFN = Callable[[Tensor, Weights, Tensor], tuple[Tensor, Tensor]]

MOMENTUM = 0.95
ORIGINAL = "mlp.{}.parametrizations.{}.original"
FUSION = "mlp.fc1.parametrizations.weight.0.fusion_weights.{}"
EXPERT = "mlp.experts.*.{}.{}"
"""Of experts that are modules, with one more dimension for them."""


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(S, rows, in), (S, out, in) and (S, out) to (S, rows, out)."""
    return torch.baddbmm(bias[:, None].to(x.dtype), x, weight.mT.to(x.dtype))


def feed_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """(S, rows, features) to the same."""
    return linear(F.gelu(linear(x, w1, b1)), w2, b2)


def dense(x: Tensor, p: Weights, order: Tensor) -> tuple[Tensor, Tensor]:
    """One weight each."""
    names = [f"mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")]
    return feed_forward(x, *(p[name] for name in names)), x.new_zeros(0)


def _fused(x: Tensor, p: Weights, w: Tensor) -> Tensor:
    """By fusion weights (S, N), equation 7."""
    stacks = [p[ORIGINAL.format(layer, kind)] for layer in ("fc1", "fc2") for kind in _KINDS]
    fused = [(w.view(*w.shape, *[1] * (e.ndim - 2)) * e).sum(1) for e in stacks]
    return feed_forward(x, *fused)


_KINDS = ("weight", "bias")


def static(x: Tensor, p: Weights, order: Tensor) -> tuple[Tensor, Tensor]:
    """`sw`, equation 8."""
    stack = p[ORIGINAL.format("fc1", "bias")]
    count = stack.shape[1]
    return _fused(x, p, stack.new_full((len(x), count), 1 / count)), x.new_zeros(0)


def learned(x: Tensor, p: Weights, order: Tensor) -> tuple[Tensor, Tensor]:
    """`dw`, equation 9."""
    return _fused(x, p, p[FUSION.format("weights")]), x.new_zeros(0)


def memory_bank(x: Tensor, p: Weights, order: Tensor) -> tuple[Tensor, Tensor]:
    """`mb`, equations 10 and 11."""
    router, bank = p[FUSION.format("router")], p[FUSION.format("bank")]
    with torch.autocast(x.device.type, enabled=False):
        current = torch.bmm(x.to(router.dtype), router.mT).softmax(-1).mean(1)
    bank = MOMENTUM * bank + (1 - MOMENTUM) * current
    return _fused(x, p, bank), bank.detach()


def _experts(p: Weights) -> list[Tensor]:
    return [p[EXPERT.format(layer, kind)] for layer in ("fc1", "fc2") for kind in _KINDS]


def mixture(x: Tensor, p: Weights, order: Tensor) -> tuple[Tensor, Tensor]:
    """MoE-N-1; every expert computes for every token; those not chosen count as zero."""
    stacks = _experts(p)
    with torch.autocast(x.device.type, enabled=False):
        router = p["mlp.router.weight"]
        shares = torch.bmm(x.to(router.dtype), router.mT).softmax(-1)
    share, chosen = shares.max(-1)
    taken = F.one_hot(chosen, shares.shape[-1]).to(shares.dtype)
    balance = shares.shape[-1] * (taken.mean(1) * shares.mean(1)).sum(-1)
    outputs = [
        (share * taken[..., i])[..., None] * feed_forward(x, *(stack[:, i] for stack in stacks))
        for i in range(shares.shape[-1])
    ]
    return torch.stack(outputs).sum(0), balance


def parted(x: Tensor, p: Weights, order: Tensor) -> tuple[Tensor, Tensor]:
    """Each expert sees another part of the tokens."""
    stacks = _experts(p)
    places = order[..., None].expand_as(x)
    rows = x.gather(1, places).reshape(len(x) * stacks[0].shape[1], -1, x.shape[-1])
    y = feed_forward(rows, *(stack.flatten(0, 1) for stack in stacks)).view(x.shape)
    return torch.zeros_like(y).scatter(1, places, y), x.new_zeros(0)


FFNS: dict[str, FFN] = {
    "dense": dense,
    "control": dense,
    "sw": static,
    "dw": learned,
    "mb": memory_bank,
    "mb, uniform bank": memory_bank,
    "mb, noise that differs": memory_bank,
    "samples parted, experts averaged": parted,
    "MoE-4-1": mixture,
}


@torch.no_grad()
def share(weights: Weights) -> None:
    """After each step, move every expert towards the mean of the others."""
    for name, stack in weights.items():
        if "experts.*" in name:
            count = stack.shape[1]
            others = (count * stack.mean(1, keepdim=True) - stack) / (count - 1)
            stack.lerp_(others, SHARE)


@torch.no_grad()
def add_noise(weights: Weights) -> None:
    """After each step, noise that differs between the experts and whose mean is zero."""
    for name, stack in weights.items():
        if name.endswith("weight.original"):
            noise = torch.randn_like(stack)
            size = stack.square().mean((1, 2, 3), keepdim=True).sqrt()
            stack.add_(NOISE * size * (noise - noise.mean(1, keepdim=True)))


AFTER_STEP: dict[str, Callable[[Weights], None]] = {
    "samples parted, experts averaged": share,
    "mb, noise that differs": add_noise,
}
