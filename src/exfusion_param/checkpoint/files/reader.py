"""Reads the tensors of a checkpoint on disk one by one: safetensors or torch, sharded or not.

Files are opened anew for each tensor. Both formats are mapped into memory, and what was read of a
mapping stays there until it is closed. Nothing is unpickled but tensors and plain containers.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...expert_config import ENTRY
from ...finding.outer_modules import clean_name
from .errors import CheckpointError, read_json
from .pieces import Piece, Pieces
from .tensor_spec import DTYPES, TensorSpec

CONFIG = "config.json"

_DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}
_NAMES = ("model.safetensors", "pytorch_model.bin", "model.pt", "model.pth", "pytorch_model.pt")
_SHARDING = "DCP_SHARDING_INFO"  # what torch's distributed checkpoints call it
_NESTED = ("state_dict", "model_state_dict", "model", "module")  # in a trainer's torch file


class CheckpointReader:
    """The tensors of a checkpoint by their names.

    Args:
        path: a file, or a folder with `model.safetensors`, `pytorch_model.bin` or an index of
            shards (`model.safetensors.index.json`), or the shards of a distributed checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path if path.is_dir() else path.parent
        self.entry: Any = None
        pieces: dict[str, list[Piece]] = defaultdict(list)
        for file in _files(path):
            with _opened(file) as tensors:
                for name in tensors.names:
                    opened = functools.partial(_opened_tensor, file, name)
                    piece = Piece(opened, tensors.offsets(name), tensors.spec(name))
                    pieces[clean_name(name)].append(piece)
                self.entry = self.entry or tensors.entry
        self._tensors = {name: _put_together(name, parts) for name, parts in pieces.items()}
        self.specs = {name: tensor.spec for name, tensor in self._tensors.items()}

    def drop_prefix(self, prefix: str) -> None:
        """Take a prefix off all names, as DDP puts one before them."""
        self._tensors = {name.removeprefix(prefix): at for name, at in self._tensors.items()}
        self.specs = {name: tensor.spec for name, tensor in self._tensors.items()}

    @contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """The tensor, or something that can be sliced like it; what was read of it is freed."""
        tensor = self._tensors[name]
        if isinstance(tensor, Pieces):
            yield tensor
        else:
            with tensor.open() as content:
                yield content

    def read(self, name: str) -> Tensor:
        """A copy of the whole tensor."""
        with self.open(name) as tensor:
            return tensor.clone() if isinstance(tensor, Tensor) else tensor[:].clone()


def read_config(folder: Path) -> dict[str, Any]:
    """What a folder's config.json holds, empty if there is none.

    Raises:
        CheckpointError: it is no JSON object.
    """
    path = folder / CONFIG
    return read_json(path) if path.is_file() else {}


def _put_together(name: str, pieces: list[Piece]) -> Piece | Pieces:
    if len(pieces) == 1 and not any(pieces[0].offsets):
        return pieces[0]
    try:
        return Pieces(pieces)
    except ValueError as error:
        raise CheckpointError(f"{name} is in {len(pieces)} files, and {error}.") from error


@contextmanager
def _opened_tensor(file: Path, name: str) -> Iterator[Any]:
    with _opened(file) as tensors:
        yield tensors.get(name)


class _SafetensorsFile:
    entry = None

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._file = safe_open(path, framework="pt")
        self.names = list(self._file.keys())
        self._pieces = json.loads((self._file.metadata() or {}).get(_SHARDING, "{}"))

    def spec(self, name: str) -> TensorSpec:
        piece = self._file.get_slice(name)
        if piece.get_dtype() not in _DTYPE_OF:
            raise CheckpointError(f"{name} is {piece.get_dtype()}, which is not supported.")
        return TensorSpec(tuple(piece.get_shape()), _DTYPE_OF[piece.get_dtype()])

    def offsets(self, name: str) -> tuple[int, ...]:
        """Where the tensor begins in one that ranks have written in pieces."""
        shape = self._file.get_slice(name).get_shape()
        offsets = self._pieces[name]["saved_offsets"] if name in self._pieces else [0] * len(shape)
        if len(offsets) != len(shape) or not all(type(o) is int and o >= 0 for o in offsets):
            raise CheckpointError(f"{name} is said to begin at {offsets}.")
        return tuple(offsets)

    def get(self, name: str) -> Any:
        piece = self._file.get_slice(name)
        return piece if piece.get_shape() else self._file.get_tensor(name)


class _TorchFile:
    def __init__(self, path: Path) -> None:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict.")
        self.entry = content.get(ENTRY)
        for name in _NESTED:
            if isinstance(content.get(name), Mapping):
                content = content[name]
        self._tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        self.names = list(self._tensors)
        for name, tensor in self._tensors.items():
            is_plain = tensor.layout == torch.strided and not tensor.is_nested
            if not is_plain or tensor.nbytes > tensor.untyped_storage().nbytes():
                raise CheckpointError(f"{path}: {name} is no plain tensor with memory of its own.")

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(tuple(self._tensors[name].shape), self._tensors[name].dtype)

    def offsets(self, name: str) -> tuple[int, ...]:
        """Zeros: torch's own files hold whole tensors."""
        return (0,) * self._tensors[name].ndim

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


@contextmanager
def _opened(path: Path) -> Iterator[_SafetensorsFile | _TorchFile]:
    """A file, for as long as something refers to what it gives."""
    try:
        file = _SafetensorsFile(path) if path.suffix == ".safetensors" else _TorchFile(path)
    except (CheckpointError, ModuleNotFoundError):
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, which is not loaded. "
            "Save the state dict alone."
        ) from error
    except Exception as error:  # each library has its own, down to the bare Exception
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is damaged or of another format: {reason}") from error
    yield file


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return _shards(path) if path.name.endswith(".index.json") else [path]
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist.")
    # As transformers does: one file before shards, which may be left from an older one.
    for name in _NAMES:
        if (path / name).is_file():
            return [path / name]
    if indices := sorted(path.glob("*.index.json"), reverse=True):  # safetensors before torch's
        return _shards(indices[0])
    if shards := sorted(path.glob("shard-*.safetensors")):  # of distributed checkpoints
        return shards
    raise CheckpointError(
        f"{path} holds no checkpoint: none of {', '.join(_NAMES)} and no *.index.json."
    )


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} holds no weight_map.")
    names = list(weight_map.values())
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is no file beside it.")
        if not os.path.isfile(index.parent / name):  # Path.is_file raises for very long names
            raise CheckpointError(f"{index} names {name[:255]}, which is missing.")
    return [index.parent / name for name in dict.fromkeys(names)]
