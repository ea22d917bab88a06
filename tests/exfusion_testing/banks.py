"""A wrapped model with one memory bank, and where that bank has to go."""

from typing import Any

import torch
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_param.fusion_weights.memory_bank import MemoryBank
from exfusion_param.tensors import functional
from exfusion_testing.models import FFNs, inputs, loss_of

MOMENTUM = 0.9


def make(fuse_on: Any = "forward", **kwargs: Any) -> FFNs:
    model = FFNs(depth=1, **kwargs).double()
    return exf.wrap(model, momentum=MOMENTUM, bank_init="uniform", seed=0, fuse_on=fuse_on)


def bank_of(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if isinstance(module, MemoryBank))


def current(model: nn.Module, x: Tensor) -> Tensor:
    """The fusion weights of a micro-batch, from the router's and the stem's present values."""
    with torch.no_grad():
        return functional.route(model.stem(x), bank_of(model).router)


def moved(model: nn.Module, *micro_batches: Tensor) -> Tensor:
    """Where the bank has to go by these micro-batches."""
    mean = torch.stack([current(model, x) for x in micro_batches]).mean(0)
    return MOMENTUM * bank_of(model).bank + (1 - MOMENTUM) * mean


def assert_bank(model: nn.Module, expected: Tensor) -> None:
    torch.testing.assert_close(bank_of(model).bank, expected, rtol=0, atol=1e-12)


def backward(model: nn.Module, *xs: Tensor) -> None:
    for x in xs:
        loss_of(model, x).backward()


def bank_after(model: nn.Module, output: Tensor) -> list[Tensor]:
    """Every bank after one step that leaves the weights as they are."""
    output.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    model.zero_grad()
    return [b.clone() for name, b in model.named_buffers() if name.endswith("bank")]


def adamw(model: nn.Module, **kwargs: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.1, **kwargs)


def assert_bank_follows(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Two steps of two micro-batches each move the bank by their means."""
    for xs in (X[:2], X[2:]):
        expected = moved(model, *xs)
        backward(model, *xs)
        optimizer.step()
        assert_bank(model, expected)
        optimizer.zero_grad()


X = [inputs(seed=seed) for seed in range(4)]
