"""Optimizer states of a parameter from before it had experts."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch import Tensor

from ..tensors.shards import local, stacked
from .fused_parameter import EXPERTS


def share_among_experts(state: dict[str, Any], name: str, count: int) -> None:
    """Give each expert a copy of the parameter's state, as of Adagrad or of dense training.

    Args:
        state: the optimizer's, of the parameter.
        name: of the parameter.
        count: N.

    Raises:
        TypeError: a state cannot be copied.
    """
    copies: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, (Tensor, list, dict)) or getattr(value, "ndim", 1) == 0:
            continue
        if isinstance(value, Tensor) and type(local(value)) is Tensor:
            copies[key] = stacked([value] * count)
        else:
            copies[key] = [_copied(key, value, name) for _ in range(count)]
    if copies and float(state.get("step", 1)) > 0:
        _warn(name)
    for key, value in copies.items():
        del state[key]
        state[f"{EXPERTS}.{key}"] = value


def _warn(name: str) -> None:
    warnings.warn(
        f"The optimizer has trained {name!r} as a dense weight, with gradients 1/w times as large "
        "as those of an expert of fusion weight w. Each expert continues with a copy of its state, "
        "and its steps have a different size until the state has adapted. Make the optimizer "
        "after wrap().",
        stacklevel=2,
    )


def _copied(key: str, value: Any, name: str) -> Any:
    try:
        return copy.deepcopy(value)
    except NotImplementedError as error:
        raise TypeError(
            f"The optimizer was made before wrap(), and its state {key!r} of {name!r} is a "
            f"{type(value).__name__}, which cannot be copied for each expert. Make the optimizer "
            "after wrap()."
        ) from error
