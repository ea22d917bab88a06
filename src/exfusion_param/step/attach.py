"""Attaches fusion weights to a dense model under `fuse_on="step"`, and removes them in `fuse`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..finding.discovery import FFNGroup
from ..fusion_weights.base import FusionWeights
from ..fusion_weights.variants import StaticWeights
from ..tensors.expert_starts import ExpertStart
from .custom_loops import CustomLoopCheck
from .fused_parameter import FusedParameter

NAME = "fusion_weights"
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@torch.no_grad()
def attach_fused(
    model: nn.Module,
    group: FFNGroup,
    weights: FusionWeights,
    starts: Mapping[str, Mapping[str, ExpertStart]],
    values: Mapping[str, Mapping[str, Tensor | None]],
) -> None:
    """Write start values into the linears of a group, and attach its fusion weights.

    Args:
        model: the model that is wrapped.
        group: the linears.
        weights: their fusion weights.
        starts: for each linear's name, how the experts of each of its tensors are drawn.
        values: for each linear's name and tensor the new value, or None where it stays.
    """
    for fqn, linear in group.linears.items():
        for name, value in values[fqn].items():
            tensor = linear.get_parameter(name)
            base = None
            if value is not None:
                base = tensor.detach().clone()
                tensor.copy_(value)
            weights.fused.append(FusedParameter(weights, linear, name, starts[fqn][name], base))
    first = next(iter(group.linears))
    home, name = _home(model, first, group.name)
    home.add_module(name, weights)
    check = group.linears[first].register_forward_hook(CustomLoopCheck(weights))
    weights.handles.append(check)
    if not isinstance(weights, StaticWeights):
        hook = group.linears[first].register_forward_hook(weights.follow_forward, with_kwargs=True)
        weights.handles.append(hook)
        _tell_apart(group.linears[first])


def detach_fused(model: nn.Module, weights: FusionWeights) -> None:
    """Leave the linears of a group dense."""
    first = weights.linears[0]
    if getattr(first.__dict__.get("forward"), "__func__", None) is type(first).forward:
        del first.__dict__["forward"]
    for fused in weights.fused:
        fused.remove_experts()
    weights.fused.clear()
    for module in model.modules():
        for name, child in list(module.named_children()):
            if child is weights:
                delattr(module, name)


def _tell_apart(linear: nn.Module) -> None:
    """Let torch.compile tell a linear with our hook from one without.

    It takes no notice of hooks (`torch._dynamo.config.skip_nnmodule_hook_guards`), and would run a
    graph that it has made of the same code for a dense model. It does look for a forward of the
    module's own.
    """
    linear.__dict__.setdefault("forward", linear.forward)


def _home(model: nn.Module, first: str, group: str) -> tuple[nn.Module, str]:
    """The module that a group's fusion weights are attached to, and their name in it.

    That is the FFN, or what holds it where the FFN is a container, which runs its children. It is
    not the linear, as `parallelize_module` shards all parameters below a linear with it.
    """
    parts = first.split(".")[:-1]
    for length in range(len(parts), -1, -1):
        home = model.get_submodule(".".join(parts[:length]))
        name = "_".join([NAME, *group.split(".")[length:]]) if group else NAME
        if not isinstance(home, _CONTAINERS) and not hasattr(home, name):
            return home, name
    return model.get_submodule(first), NAME
