"""Nested state dicts as named tensors and JSON, and back; nothing in them is ever unpickled."""

from __future__ import annotations

import base64
import importlib
import math
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError

MARK = "__is__"
"""The key of what JSON has no words for; its value says what it is."""

_QUANTIZED = {
    "OptimState8bit": "torchao.optim.subclass_8bit",
    "OptimState4bit": "torchao.optim.subclass_4bit",
    "OptimStateFp8": "torchao.optim.subclass_fp8",
}
"""The classes that a checkpoint can name: torchao's states of optimizers, with tensors in them."""


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor is one of torchao's states."""
    module = sys.modules.get(_QUANTIZED.get(type(tensor).__name__, ""))
    return module is not None and type(tensor) is getattr(module, type(tensor).__name__)


def split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A state dict as JSON can hold it; its tensors go to `tensors`.

    Args:
        value: nested dicts, lists, tuples and sets of tensors, numbers, strings, bytes and None.
        name: of the value; those of its tensors begin with it.
        tensors: takes them.

    Raises:
        TypeError: it holds something else; the message says where.
    """
    if isinstance(value, Tensor):
        if is_quantized(value):
            names, context = value.__tensor_flatten__()  # type: ignore[attr-defined]
            inner = {name: getattr(value, name) for name in names}
            content = {"class": type(value).__name__, "inner": inner, "context": context}
            return {MARK: "quantized", "value": split(content, name, tensors)}
        while name in tensors:  # {"a.b": x, "a": {"b": y}}
            name += "'"
        tensors[name] = value.detach()
        return {MARK: "tensor", "value": name}
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {MARK: "float", "value": str(value)}
    if isinstance(value, bytes):
        return {MARK: "bytes", "value": base64.b64encode(value).decode()}
    if isinstance(value, torch.dtype):
        return {MARK: "dtype", "value": str(value).removeprefix("torch.")}
    if isinstance(value, list | tuple | set):
        ordered = sorted(value, key=repr) if isinstance(value, set) else value  # equal sets alike
        items = [split(item, f"{name}.{i}", tensors) for i, item in enumerate(ordered)]
        kind = next(kind for kind in (list, tuple, set) if isinstance(value, kind))
        return items if kind is list else {MARK: kind.__name__, "value": items}
    if isinstance(value, Mapping):
        return _split_mapping(value, name, tensors)
    return split(_of_numpy(value, name), name, tensors)


def _split_mapping(value: Mapping[Any, Any], name: str, tensors: dict[str, Tensor]) -> Any:
    is_plain = all(isinstance(key, str) for key in value) and MARK not in value
    if is_plain and not isinstance(value, Counter):
        return {key: split(item, f"{name}.{key}", tensors) for key, item in value.items()}
    pairs = [
        [split(key, f"{name}.key{i}", tensors), split(item, f"{name}.{key}", tensors)]
        for i, (key, item) in enumerate(value.items())
    ]
    return {MARK: "counter" if isinstance(value, Counter) else "dict", "value": pairs}


def _of_numpy(value: Any, name: str) -> Any:
    """A scalar or an array of numpy as a number or a tensor, which is what comes back."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return value.item()
    if numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value)
    raise TypeError(
        f"{name} is a {type(value).__name__}, which a checkpoint does not hold: only tensors, "
        "numbers, strings, bytes, None, and dicts, lists, tuples and sets of them."
    )


def join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Restore the value that was given to `split`.

    Raises:
        CheckpointError: the value is not of `split`, or a tensor is missing.
    """
    if isinstance(value, list):
        return [join(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if MARK not in value:
        return {key: join(item, tensors) for key, item in value.items()}
    try:
        return _join_marked(value[MARK], value["value"], tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"a value of the checkpoint is malformed: {error!r}") from error


def _join_marked(mark: str, content: Any, tensors: Mapping[str, Tensor]) -> Any:
    if mark == "tensor":
        return tensors[content]
    if mark == "quantized":
        content = join(content, tensors)
        kind = getattr(importlib.import_module(_QUANTIZED[content["class"]]), content["class"])
        return kind.__tensor_unflatten__(content["inner"], content["context"], None, None)
    if mark == "float":
        return float(content)
    if mark == "bytes":
        return base64.b64decode(content, validate=True)
    if mark == "dtype":
        dtype = getattr(torch, content)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{content!r} is not a dtype")
        return dtype
    if mark in ("tuple", "set"):
        return (tuple if mark == "tuple" else set)(join(item, tensors) for item in content)
    if mark in ("dict", "counter"):
        pairs = {join(key, tensors): join(item, tensors) for key, item in content}
        return pairs if mark == "dict" else Counter(pairs)
    raise ValueError(f"{mark!r} is unknown")


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal, bit for bit."""
    parts: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    if split(a, "", parts[0]) != split(b, "", parts[1]):
        return False
    return all(
        tensor.dtype == parts[1][name].dtype and torch.equal(tensor, parts[1][name])
        for name, tensor in parts[0].items()
    )
