"""Where the experts of a wrapped model are, under either `fuse_on`."""

from typing import Any

import torch
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_param.fusion.lookup import fused_names, groups_of, original, wrapped_linears


def expert_stacks(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The expert stacks by the dense names of what they fuse into."""
    stacks = {}
    for fqn, linear in wrapped_linears(model).items():
        for name in fused_names(linear):
            if hasattr(linear, "parametrizations"):
                stack: Tensor = original(linear, name)
            else:
                stack = optimizer.state[getattr(linear, name)]["experts"]
            stacks[f"{fqn}.{name}"] = stack
    return stacks


def fusion_weights(model: nn.Module, index: int = 0) -> Any:
    """The fusion weights of an FFN group."""
    return list(groups_of(model))[index]


def assert_trained_alike(
    ours: tuple[nn.Module, torch.optim.Optimizer],
    theirs: tuple[nn.Module, torch.optim.Optimizer],
    **tolerance: float,
) -> None:
    """Two models, each with its optimizer, have the same weights, experts and fusion weights."""
    tolerance = tolerance or {"rtol": 0, "atol": 1e-9}
    states = [dict(exf.fused_state_dict(model)) for model, _ in (ours, theirs)]
    torch.testing.assert_close(*states, **tolerance)
    torch.testing.assert_close(expert_stacks(*ours), expert_stacks(*theirs), **tolerance)
    own = [[weights.state_dict() for weights in groups_of(model)] for model, _ in (ours, theirs)]
    for one, other in zip(*own, strict=True):
        torch.testing.assert_close(dict(one), dict(other), **tolerance)
