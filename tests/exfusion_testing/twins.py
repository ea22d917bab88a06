"""The same model, fused at each forward and at each step."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_testing.models import FFNs, loss_of


def twins(variant: str, depth: int = 2, **kwargs: Any) -> tuple[FFNs, FFNs]:
    """The same model, fused at each forward and at each step."""
    fields = {"variant": variant, "seed": 0, "bank_init": "uniform"} | kwargs
    torch.manual_seed(0)
    dense = FFNs(depth=depth).double()
    return (
        exf.wrap(copy.deepcopy(dense), fuse_on="forward", **fields),
        exf.wrap(copy.deepcopy(dense), fuse_on="step", **fields),
    )


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """A step on one batch."""
    loss_of(model, x).backward()
    optimizer.step()
    optimizer.zero_grad()
