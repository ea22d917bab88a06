"""Looks up columns of a history, and shortens their names for a figure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..history import History


def group_names(history: History, measure: str = "fusion_weights") -> list[str]:
    """The FFN groups whose fusion weights, or router load, a history holds, in its order.

    Examples:
        >>> group_names({"step": [1], "fusion_weights/blocks.0.mlp/0": [1.0], "loss": [2.0]})
        ['blocks.0.mlp']
    """
    parts = 2 if measure == "router_load" else 1  # label and expert, or expert
    names = [name.split("/", 1)[1] for name in history if name.startswith(f"{measure}/")]
    return list(dict.fromkeys(name.rsplit("/", parts)[0] for name in names))


def columns_of(history: History, measure: str, group: str) -> list[str]:
    """The columns of one FFN group; raises a ValueError where there are none."""
    groups = group_names(history, measure)
    if group not in groups:
        raise ValueError(
            f"The history has no FFN group {group!r} with {measure}. It has {listed(groups)}."
        )
    depth = 2 if measure == "router_load" else 1
    prefix = f"{measure}/{group}"
    return [name for name in history if name.rsplit("/", depth)[0] == prefix]


def require(history: History, *columns: str, of: str = "The history") -> None:
    """Raise a ValueError unless the history has these columns."""
    for name in columns:
        if name not in history:
            raise ValueError(f"{of} has no column {name!r}. It has {listed(history)}.")


def measured(history: History, x: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Two columns without the rows in which the second has no value."""
    at, values = np.array(history[x], dtype=float), np.array(history[column], dtype=float)
    is_measured = ~np.isnan(values)
    return at[is_measured], values[is_measured]


def shown(name: str) -> str:
    """A name as matplotlib takes it: not empty, no mathematics, no underscore that hides it."""
    return f" {name}".replace("$", r"\$") if name else "(the model)"


def listed(names: Mapping[str, object] | list[str]) -> str:
    """The first names, for a message."""
    shown = list(names)[:8]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "") if shown else "none"
