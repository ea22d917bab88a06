"""What each rank has for itself: one JSON file, and one of tensors beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ...atomic_files import write_file
from .errors import CheckpointError, read_json
from .plain_values import join, split

RANKS = "ranks"
"""The folder of these files."""


class RankValues:
    """The values of one rank's parts, as files hold them.

    Args:
        values: for each part its nested plain values and tensors.

    Raises:
        TypeError: they hold what a file cannot.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.plain = {name: split(value, name, self.tensors) for name, value in values.items()}

    def write(self, folder: Path, rank: int) -> None:
        """Write the rank's files."""
        from safetensors.torch import save

        copies = {
            name: tensor.detach().cpu().clone().contiguous()
            for name, tensor in self.tensors.items()
        }
        plain, tensors = _files(folder, rank)
        plain.parent.mkdir(exist_ok=True)
        write_file(plain, json.dumps(self.plain).encode())
        write_file(tensors, save(copies))


def read_rank(folder: Path, rank: int) -> dict[str, Any]:
    """The values that a rank has written.

    Raises:
        CheckpointError: they are malformed.
    """
    from safetensors.torch import load_file

    plain, tensors = _files(folder, rank)
    try:
        loaded = load_file(tensors)
    except Exception as error:  # safetensors has its own, down to the bare Exception
        raise CheckpointError(f"{tensors} cannot be read: {error}") from error
    return join(read_json(plain), loaded)


def _files(folder: Path, rank: int) -> tuple[Path, Path]:
    name = f"{RANKS}/rank-{rank:05d}"
    return folder / f"{name}.json", folder / f"{name}.safetensors"
