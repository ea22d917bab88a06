"""The state of each rank: one JSON file, and one of tensors beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...atomic_files import write_file
from .errors import CheckpointError, read_json
from .plain_values import join

RANKS = "ranks"
"""The folder of these files."""


def write_rank(folder: Path, rank: int, plain: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write the values of one rank's parts, as `plain_values.split` gives them."""
    from safetensors.torch import save

    copies = {name: tensor.cpu().clone().contiguous() for name, tensor in tensors.items()}
    (folder / RANKS).mkdir(exist_ok=True)
    write_file(_file(folder, rank, "json"), json.dumps(plain).encode())
    write_file(_file(folder, rank, "safetensors"), save(copies))


def read_rank(folder: Path, rank: int) -> dict[str, Any]:
    """The values that a rank has written.

    Raises:
        CheckpointError: they are malformed.
    """
    from safetensors.torch import load_file

    path = _file(folder, rank, "safetensors")
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors has its own, down to the bare Exception
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return join(read_json(_file(folder, rank, "json")), tensors)


def _file(folder: Path, rank: int, kind: str) -> Path:
    return folder / RANKS / f"rank-{rank:05d}.{kind}"
