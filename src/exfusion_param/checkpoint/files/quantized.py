"""States of optimizers that torchao quantizes: subclasses of Tensor, by the tensors in them."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import Tensor

_MODULES = {
    "OptimState8bit": "torchao.optim.subclass_8bit",
    "OptimState4bit": "torchao.optim.subclass_4bit",
    "OptimStateFp8": "torchao.optim.subclass_fp8",
}
"""All that a checkpoint can name, and where it is."""


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor is one of torchao's states."""
    module = sys.modules.get(_MODULES.get(type(tensor).__name__, ""))
    return module is not None and type(tensor) is getattr(module, type(tensor).__name__)


def flatten(tensor: Tensor) -> dict[str, Any]:
    """A quantized tensor as plain tensors and values."""
    state: Any = tensor
    names, context = state.__tensor_flatten__()
    inner = {name: getattr(state, name) for name in names}
    return {"class": type(tensor).__name__, "inner": inner, "context": context}


def unflatten(content: dict[str, Any]) -> Tensor:
    """What `flatten` was given.

    Raises:
        KeyError: of a class that is not known.
        ImportError: torchao is not there.
    """
    name = content["class"]
    kind: Any = getattr(importlib.import_module(_MODULES[name]), name)
    tensor: Tensor = kind.__tensor_unflatten__(content["inner"], content["context"], None, None)
    return tensor
