"""Writes a safetensors file tensor by tensor, in parts, which the safetensors library cannot.

The format: the header's length in 8 bytes, the header in JSON, then the tensors' bytes one behind
the other (https://github.com/huggingface/safetensors#format). Shapes and dtypes have to be known
from the start, the contents one part at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from .tensor_spec import DTYPES, TensorSpec


class SafetensorsWriter:
    """A context manager that makes the file.

    Args:
        path: of the file.
        specs: the tensors by their names. `order` is the order in which they must be written.

    Raises:
        ValueError: a dtype has no name in the format.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        for name, spec in specs.items():
            if spec.dtype not in DTYPES:
                raise ValueError(f"{name} is {spec.dtype}, which safetensors does not hold.")
        if "__metadata__" in specs:
            raise ValueError("A tensor is named __metadata__, which safetensors does not hold.")
        # Larger elements first, so that each tensor is aligned to its own.
        self.order = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
        self._left = sum(spec.nbytes for spec in specs.values())
        self._header = _header(self.order, specs)
        self._path = path

    def __enter__(self) -> SafetensorsWriter:
        self._file = open(self._path, "wb")
        self._file.write(self._header)
        return self

    def write(self, part: Tensor) -> None:
        """Write the next tensor, or the next part of it, from any device."""
        part = part.detach().cpu().contiguous().flatten()
        self._left -= part.nbytes
        self._file.write(part.view(torch.uint8).numpy().data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        assert error is not None or self._left == 0


def _header(order: list[str], specs: Mapping[str, TensorSpec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        spec = specs[name]
        entries[name] = {
            "dtype": DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, start + spec.nbytes],
        }
        start += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
