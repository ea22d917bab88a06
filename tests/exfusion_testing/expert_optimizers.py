"""A model that fuses at each step, and its training with one optimizer or another."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_testing.models import FFNs, inputs, loss_of

Make = Callable[[Any], torch.optim.Optimizer]
ADAMW = {"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.1}


def wrapped(config: exf.ExFusionConfig | None = None, **fields: Any) -> Any:
    """FFNs in float64 that fuse at each step."""
    torch.manual_seed(0)
    fields = {"num_experts": 5, "bank_init": "uniform", "seed": 1} | fields
    config = config or exf.ExFusionConfig(**fields)
    return exf.wrap(FFNs(5, 7).double(), config, fuse_on="step")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range = range(3)) -> None:
    """A step for each seed."""
    for seed in seeds:
        loss_of(model, inputs(model.stem.in_features, seed=seed)).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(ours: nn.Module, theirs: nn.Module, **tolerance: float) -> None:
    """Two models have equal parameters and buffers."""
    tolerance = tolerance or {"rtol": 0, "atol": 1e-11}
    torch.testing.assert_close(
        dict(ours.named_parameters()), dict(theirs.named_parameters()), **tolerance
    )
    torch.testing.assert_close(
        dict(ours.named_buffers()), dict(theirs.named_buffers()), **tolerance
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """A step on one batch."""
    loss_of(model, x).backward()
    optimizer.step()
    optimizer.zero_grad()
