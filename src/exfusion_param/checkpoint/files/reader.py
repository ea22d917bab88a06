"""Reads the tensors of a checkpoint on disk one by one: safetensors or torch, sharded or not.

Both formats are mapped into memory. What was read of a mapping stays there until nothing refers to
it any more, so files are opened again for each tensor. What ranks have written in pieces is put
together by torch, in memory.
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...expert_config import ENTRY
from ...finding.outer_modules import clean_name
from .errors import CheckpointError, read_json
from .tensor_files import read_tensors, stored_tensors
from .tensor_spec import TensorSpec

CONFIG = "config.json"

_NAMES = ("model.safetensors", "pytorch_model.bin", "model.pt", "model.pth", "pytorch_model.pt")
_PIECES = "shard-*-model-*.safetensors"  # as torch's distributed checkpoints name ranks' files
_NESTED = ("state_dict", "model_state_dict", "model", "module")  # in a trainer's torch file


class CheckpointReader:
    """The tensors of a checkpoint by their names.

    Args:
        path: a file, or a folder with `model.safetensors`, `pytorch_model.bin` or an index of
            shards (`model.safetensors.index.json`), or the shards of a distributed checkpoint.

    Attributes:
        folder: of the files.
        specs: shapes and dtypes by the tensors' names.
        entry: what a torch file itself tells of ExFusion, as `describe` gives it.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path if path.is_dir() else path.parent
        self.entry: Any = None
        self.specs: dict[str, TensorSpec] = {}
        self._stored: dict[str, _Stored] = {}
        for file in _files(path):
            content = _contents(file)
            for name, spec in content.specs.items():
                if clean_name(name) in self.specs:
                    raise CheckpointError(f"{self.folder} holds {clean_name(name)} twice.")
                self.specs[clean_name(name)] = spec
                self._stored[clean_name(name)] = _Stored(file, name)
            self.entry = self.entry or content.entry
        self._put_together = functools.lru_cache(maxsize=1)(_put_together)

    def drop_prefix(self, prefix: str) -> None:
        """Take a prefix off all names, as DDP puts one before them."""
        self.specs = {name.removeprefix(prefix): spec for name, spec in self.specs.items()}
        self._stored = {name.removeprefix(prefix): at for name, at in self._stored.items()}

    def mapped(self, name: str) -> Tensor:
        """The tensor, to read parts of; what was read is freed when nothing refers to it.

        Of a tensor in pieces the whole is in memory, until another one is asked for.
        """
        stored = self._stored[name]
        if stored.file.is_dir():
            return self._put_together(stored, self.specs[name])
        return _contents(stored.file, stored.name).tensors[stored.name]


class _Stored(NamedTuple):
    """Where a tensor is.

    Args:
        file: the file, or the folder of pieces.
        name: in it.
    """

    file: Path
    name: str


class _Contents(NamedTuple):
    """What is in a file.

    Args:
        specs: shapes and dtypes.
        tensors: mapped into memory.
        entry: what it tells of ExFusion.
    """

    specs: Mapping[str, TensorSpec]
    tensors: Mapping[str, Tensor]
    entry: Any = None


def read_config(folder: Path) -> dict[str, Any]:
    """What a folder's config.json holds, empty if there is none.

    Raises:
        CheckpointError: it holds no JSON object.
    """
    path = folder / CONFIG
    return read_json(path) if path.is_file() else {}


def _contents(path: Path, name: str | None = None) -> _Contents:
    """All that is in a file, or one tensor of it."""
    if path.is_dir():
        return _Contents(stored_tensors(path), {})
    try:
        if path.suffix == ".safetensors":
            return _of_tensors(_safetensors(path, name))
        return _of_torch_file(path)
    except (CheckpointError, ModuleNotFoundError):
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, which is not loaded. "
            "Save only the state dict."
        ) from error
    except Exception as error:  # each library has its own, down to the bare Exception
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is damaged or of another format: {reason}") from error


def _of_tensors(tensors: Mapping[str, Tensor], entry: Any = None) -> _Contents:
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    return _Contents(specs, tensors, entry)


def _safetensors(path: Path, name: str | None) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = list(file.keys()) if name is None else [name]
        return {name: file.get_tensor(name) for name in names}


def _of_torch_file(path: Path) -> _Contents:
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict.")
    entry = content.get(ENTRY)
    for name in _NESTED:
        if isinstance(content.get(name), Mapping):
            content = content[name]
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    for name, tensor in tensors.items():
        is_plain = tensor.layout == torch.strided and not tensor.is_nested
        if not is_plain or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name} is not a plain tensor with memory of its own.")
    return _of_tensors(tensors, entry)


def _put_together(stored: _Stored, spec: TensorSpec) -> Tensor:
    tensor = torch.empty(spec.shape, dtype=spec.dtype)
    read_tensors(stored.file, {stored.name: tensor})
    return tensor


def _files(path: Path) -> list[Path]:
    """The files of a checkpoint, or the folder where ranks' files are."""
    if path.is_file():
        if path.match(_PIECES):
            return [path.parent]
        return _shards(path) if path.name.endswith(".index.json") else [path]
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist.")
    # As transformers does: one file before shards, which may be left from an older one.
    for name in _NAMES:
        if (path / name).is_file():
            return [path / name]
    if indices := sorted(path.glob("*.index.json"), reverse=True):  # safetensors before torch's
        return _shards(indices[0])
    if any(path.glob(_PIECES)):
        return [path]
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
            raise CheckpointError(f"{index} names {name!r}, which is not a file beside it.")
        if not os.path.isfile(index.parent / name):  # Path.is_file raises for very long names
            raise CheckpointError(f"{index} names {name[:255]}, which is missing.")
    return [index.parent / name for name in dict.fromkeys(names)]
