"""Functions of a user's module, by their names on the command line."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]


def functions_of(train: str, build: str) -> tuple[Function, Function]:
    """Import what makes a model, and what trains it.

    Returns:
        The functions, `build` first.

    Raises:
        ValueError: there is no such module, or it has no such functions.
    """
    module, _, name = train.partition(":")
    if not module or not name:
        raise ValueError(f"train must be MODULE:FUNCTION, such as my_task:train, got {train!r}.")
    try:
        found = vars(importlib.import_module(module))
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ValueError(f"The module {module} is neither in this folder nor installed.") from error
    for function in (build, name):
        if not callable(found.get(function)):
            raise ValueError(f"The module {module} has no function {function!r}.")
    return found[build], found[name]
