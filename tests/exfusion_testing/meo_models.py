"""Models under MEO, and a plain twin of what their linears compute."""

from typing import Any

import torch
from torch import Tensor, nn

from exfusion_param import meo
from exfusion_param.meo.gate import Gate
from exfusion_testing.models import FFNs


def dense(dim: int = 4, hidden: int = 6) -> FFNs:
    """FFNs in float64."""
    torch.manual_seed(0)
    return FFNs(dim, hidden).double()


def wrapped(dim: int = 4, hidden: int = 6, **fields: Any) -> Any:
    """FFNs in float64, with gates that differ for each sample."""
    return wrap(dense(dim, hidden), **fields)


def wrap(model: nn.Module, **fields: Any) -> Any:
    """A model with gates that differ for each sample."""
    fields = {"num_experts": 5, "top_k": 3, "seed": 1} | fields
    return with_random_gates(meo.wrap(model, **fields))


def with_random_gates(model: Any, scale: float = 1.0) -> Any:
    """Gates, noise and token blocks that are not zero, as after some training."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, Gate):
            for parameter in module.parameters():
                with torch.no_grad():
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.copy_(scale * noise)
    return model


def gate_of(linear: nn.Module) -> Gate:
    """The gate of a linear."""
    gate = linear.get_submodule("parametrizations.weight.0").fusion_weights
    assert isinstance(gate, Gate)
    return gate


def plain_gates(gate: Gate, pooled: Tensor) -> Tensor:
    """Gates without noise for each row, one row and one expert after the other, (B, N)."""
    rows = []
    for x in pooled:
        logits = gate.gate @ x
        kept = sorted(range(len(logits)), key=lambda i: -logits[i].item())[: gate.config.kept]
        total = sum(logits[i].exp() for i in kept)
        rows.append(
            torch.stack(
                [
                    logits[i].exp() / total if i in kept else 0 * logits[i]
                    for i in range(len(logits))
                ]
            )
        )
    return torch.stack(rows)


def plain_linear(linear: Any, x: Tensor) -> Tensor:
    """The gated sum of the experts' outputs, sample by sample, for x of shape (B, T, D)."""
    gates = plain_gates(gate_of(linear), x.mean(dim=1))
    stack, bias = (linear.parametrizations[name].original for name in ("weight", "bias"))
    outputs = []
    for g, sample in zip(gates, x, strict=True):
        experts = [sample @ e.mT + b for e, b in zip(stack, bias, strict=True)]
        outputs.append(sum(weight * y for weight, y in zip(g, experts, strict=True)))
    return torch.stack(outputs)
