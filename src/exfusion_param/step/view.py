"""An optimizer as its own `step` sees it: with other parameters than it holds.

torch's fused kernels take no list of tensors that are spread over several meshes, or over none, as
the parameters of one group are under tensor parallelism without FSDP2. For optimizers that use such
a kernel by default, a view has a group for each mesh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .one_pass import OnePassOptimizer

_INDICES = "_exfusion_indices"
"""The attribute of a view: of which of the optimizer's groups each of its groups is a part."""


def is_view(optimizer: Optimizer) -> bool:
    """Whether a step runs already, and this is a call of a base class's `step` within it."""
    return _INDICES in vars(optimizer)


def view_of(optimizer: Optimizer, seen: Mapping[int, Sequence[nn.Parameter]]) -> Optimizer:
    """An optimizer with other parameters in the place of some.

    Args:
        optimizer: itself.
        seen: those in the place of a parameter, by its id.
    """
    indices: list[int] = []
    groups: list[dict[str, Any]] = []
    for index, group in enumerate(optimizer.param_groups):
        params = [p for own in group["params"] for p in seen.get(id(own), (own,))]
        named = _named(group, seen)
        is_apart = isinstance(optimizer, OnePassOptimizer) and group["fused"]
        for part in _by_mesh(params) if is_apart else [params]:
            indices.append(index)
            names = {"param_names": [named[id(p)] for p in part]} if named else {}
            groups.append(group | names | {"params": part})
    view: Optimizer = object.__new__(type(optimizer))
    view.__dict__.update(vars(optimizer), param_groups=groups, **{_INDICES: indices})
    return view


def copy_back(view: Optimizer, optimizer: Optimizer) -> None:
    """Let the optimizer have what its step changed of itself and of its groups' settings."""
    for index, seen in zip(vars(view)[_INDICES], view.param_groups, strict=True):
        own = {k: value for k, value in seen.items() if k not in ("params", "param_names")}
        optimizer.param_groups[index].update(own)
    kept = ("param_groups", "state", _INDICES)
    optimizer.__dict__.update({k: v for k, v in vars(view).items() if k not in kept})


def _named(group: Mapping[str, Any], seen: Mapping[int, Sequence[nn.Parameter]]) -> dict[int, str]:
    """The names that a group has for its parameters, by the ids of those in their places."""
    pairs = zip(group["params"], group.get("param_names", ()), strict=False)
    return {id(p): name for own, name in pairs for p in seen.get(id(own), (own,))}


def _by_mesh(params: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters that are spread over one mesh, for each; those that are not spread."""
    parts: dict[Any, list[nn.Parameter]] = {}
    for parameter in params:
        mesh = getattr(parameter, "device_mesh", None)  # a DTensor's
        parts.setdefault(mesh, []).append(parameter)
    return list(parts.values()) or [[]]
