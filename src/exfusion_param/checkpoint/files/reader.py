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
from typing import Any

import torch
from torch import Tensor

from ...expert_config import ENTRY
from ...finding.outer_modules import clean_name
from .errors import CheckpointError, read_json
from .tensor_files import read_tensors, stored_tensors

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
        specs: tensors without memory, on the meta device, by their names.
        entry: what a torch file itself tells of ExFusion, as `describe` gives it.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path if path.is_dir() else path.parent
        self.entry: Any = None
        self.specs: dict[str, Tensor] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        for file in _files(path):
            tensors, entry = _contents(file)
            self.entry = self.entry or entry
            for stored, tensor in tensors.items():
                if (name := clean_name(stored)) in self.specs:
                    raise CheckpointError(f"{self.folder} holds {name} twice.")
                self.specs[name] = tensor.to("meta")
                self._places[name] = file, stored
        self._assembled = functools.lru_cache(maxsize=1)(_assembled)

    def drop_prefix(self, prefix: str) -> None:
        """Take a prefix off all names, as DDP puts one before them."""
        self.specs = {name.removeprefix(prefix): spec for name, spec in self.specs.items()}
        self._places = {name.removeprefix(prefix): at for name, at in self._places.items()}

    def mapped(self, name: str) -> Tensor:
        """The tensor, to read parts of; what was read is freed when nothing refers to it.

        Of a tensor in pieces the whole is in memory, until another one is asked for.
        """
        file, stored = self._places[name]
        if file.is_dir():
            return self._assembled(file, stored, self.specs[name])
        return _contents(file, stored)[0][stored]


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json; empty if there is none.

    Raises:
        CheckpointError: it holds no JSON object.
    """
    path = folder / CONFIG
    return read_json(path) if path.is_file() else {}


def _contents(path: Path, name: str | None = None) -> tuple[Mapping[str, Tensor], Any]:
    """The tensors in a file, all or one, mapped into memory; and what it tells of ExFusion."""
    if path.is_dir():
        return stored_tensors(path), None
    try:
        return _of_safetensors(path, name) if path.suffix == ".safetensors" else _of_torch(path)
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


def _of_safetensors(path: Path, name: str | None) -> tuple[dict[str, Tensor], None]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = list(file.keys()) if name is None else [name]
        return {name: file.get_tensor(name) for name in names}, None


def _of_torch(path: Path) -> tuple[dict[str, Tensor], Any]:
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
    return tensors, entry


def _assembled(folder: Path, name: str, spec: Tensor) -> Tensor:
    tensor = torch.empty_like(spec, device="cpu")
    read_tensors(folder, {name: tensor})
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
