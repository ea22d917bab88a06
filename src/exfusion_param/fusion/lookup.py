"""Looks up what is wrapped in a model, under both settings of `fuse_on`."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..finding.outer_modules import clean_name, unwrapped
from ..fusion_weights.base import FusionWeights, live_groups
from ..fusion_weights.fused import Fused
from ..tensors import functional
from ..tensors.shards import as_expert, full_tensor, is_sharded, local, with_all_experts
from .expert_fusion import ExpertFusion
from .outside_access import computed, require_sound
from .refused_edits import half_removed


def original(linear: nn.Module, name: str) -> nn.Parameter:
    """The expert stack behind a fused tensor."""
    return linear.get_parameter(f"parametrizations.{name}.original")


def fused_tensor(linear: nn.Module, name: str) -> Tensor:
    """A copy of the fused tensor as the experts have it now; a DTensor if they are."""
    if name not in parametrized_names(linear):
        return linear.get_parameter(name).detach().clone()
    require_sound(linear, name)
    if is_sharded(original(linear, name)):  # each rank fuses its own part
        stack = with_all_experts(original(linear, name))
        weights = full_tensor(fusion_weights_of(linear)())
        return as_expert(functional.fuse(local(stack), weights), stack)
    return computed(linear, name)


def dense_shape(linear: nn.Module, name: str) -> torch.Size:
    """The shape of a fused tensor, without computing it."""
    if name in parametrized_names(linear):
        return original(linear, name).shape[1:]
    return linear.get_parameter(name).shape


def wrapped_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The wrapped linears by their names in the model."""
    by_step = _weights_by_step()
    return {
        fqn: module
        for fqn, module in model.named_modules()
        if id(module) in by_step or parametrized_names(module)
    }


def fusion_weights_of(linear: nn.Module) -> FusionWeights:
    """The fusion weights of a wrapped linear.

    Raises:
        RuntimeError: its weight is not fused any more, and its bias is.
    """
    if not (fused := parametrized_names(linear)):
        return _weights_by_step()[id(linear)]
    if "weight" not in fused:
        raise half_removed(linear)
    group = linear.get_submodule("parametrizations.weight.0").fusion_weights
    assert isinstance(group, FusionWeights)
    return group


def groups_of(model: nn.Module) -> dict[FusionWeights, str]:
    """The fusion weights of a model's wrapped linears, each with its FFN group's name in it."""
    names: dict[FusionWeights, str] = {}
    first_of: dict[FusionWeights, str] = {}
    by_step = _weights_by_step()
    for fqn, linear in wrapped_linears(model).items():
        group = by_step.get(id(linear)) or fusion_weights_of(linear)
        fqn = clean_name(fqn)
        if linear is group.linears[0]:
            names[group] = fqn.removesuffix(group.first_linear).rstrip(".")
            first_of[group] = fqn
        else:
            names.setdefault(group, group.group)
    taken = Counter(names.values())  # siblings that were wrapped apart have one parent
    return {
        group: name if taken[name] == 1 else first_of.get(group, f"{name}.{i}")
        for i, (group, name) in enumerate(names.items())
    }


def labels_of(model: nn.Module) -> dict[FusionWeights, str]:
    """As `groups_of`, for columns and tables: a model that is one FFN goes by its class."""
    return {
        group: name or type(unwrapped(model)).__name__ for group, name in groups_of(model).items()
    }


def fused_parameter(parameter: nn.Parameter) -> Fused | None:
    """The record of a parameter that is fused at each step; None for any other."""
    every = (fused for group in live_groups() for fused in group.fused)
    return next((fused for fused in every if fused.parameter is parameter), None)


def fused_names(linear: nn.Module) -> list[str]:
    """The names of the tensors that are fused, such as ["weight", "bias"]."""
    if names := parametrized_names(linear):
        return names
    group = _weights_by_step().get(id(linear))
    return [] if group is None else [f.name for f in group.fused if f.linear is linear]


def parametrized_names(linear: nn.Module) -> list[str]:
    """The names of the tensors that are fused at each use."""
    if not parametrize.is_parametrized(linear):
        return []
    lists = linear.get_submodule("parametrizations").named_children()
    return [name for name, fusions in lists if isinstance(fusions[0], ExpertFusion)]  # type: ignore[index]


def _weights_by_step() -> dict[int, FusionWeights]:
    """The fusion weights of all linears that live under `fuse_on="step"`, by the linears' ids."""
    return {id(fused.linear): group for group in live_groups() for fused in group.fused}
