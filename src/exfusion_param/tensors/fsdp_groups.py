"""Reads FSDP's records of the parameters that it manages, which have no public names in torch."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def param_groups_of(state: Any) -> list[Any]:
    """The groups of parameters that FSDP2 gathers together for one module.

    Args:
        state: of a module that was given to `fully_shard`.

    Raises:
        AttributeError: this version of torch has other names.
    """
    if hasattr(state, "_fsdp_param_groups"):  # since torch 2.13 a module may have several
        groups: list[Any] = state._fsdp_param_groups
        return groups
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def is_flattened(parameter: Tensor) -> bool:
    """Whether FSDP1 has made it a part of a flat parameter."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def is_resharded_after_forward(parameter: Tensor) -> bool:
    """Whether FSDP2 takes a gathered parameter away between a forward and its backward.

    Args:
        parameter: a sharded one. One that FSDP2 does not manage is not resharded; if this version
            of torch has other names, it may be.
    """
    try:
        groups = [group for state in _states() for group in param_groups_of(state)]
        managed = {
            id(param.sharded_param): group for group in groups for param in group.fsdp_params
        }
        group = managed.get(id(parameter))
        return group is not None and group.post_forward_mesh_info is not None
    except AttributeError:
        return True


def _states() -> list[Any]:
    """Of all modules that were given to `fully_shard`."""
    fsdp = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_state")
    known: Any = sys.modules.get("torch.distributed._composable_state")
    if fsdp is None:
        return []
    found = [reference() for reference in known._module_state_mapping.values()]
    return [state for state in found if isinstance(state, fsdp.FSDPState)]
