"""Tensors on disk by torch's distributed checkpoints, in safetensors.

DCP writes each rank's part of sharded tensors, and tensors that all ranks have once; it reads them
on any number of ranks. Each file describes its own contents (`HuggingFaceStorageWriter`), so
that DCP's own `.metadata`, which is a pickle, is not needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ...tensors.shards import is_sharded, local
from .errors import CheckpointError

FILE_BYTES = 2**32
"""The largest size of a rank's file; each file is assembled in memory."""


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], group: ProcessGroup | None = None
) -> None:
    """Write tensors; all ranks of the group call this with the same names."""
    if not tensors:
        return
    numbers = _file_numbers(tensors, 1 if group is None else group.size())
    writer = HuggingFaceStorageWriter(str(folder), numbers, save_distributed=True)
    with _clear_messages(group):
        save(
            _with_memory_of_their_own(tensors),
            storage_writer=writer,
            process_group=group,
            no_dist=group is None,
        )


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors in a folder of `write_tensors`, without memory, on the meta device.

    Raises:
        CheckpointError: a file is damaged, or one that holds a piece of a tensor is missing.
    """
    if not folder.is_dir():
        return {}
    try:
        stored: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        for name, tensor in stored.items():
            if sum(chunk.sizes.numel() for chunk in tensor.chunks) != tensor.size.numel():
                raise ValueError(f"the pieces of {name} do not make up a tensor")
        return {
            name: torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta")
            for name, tensor in stored.items()
        }
    except Exception as error:  # safetensors has its own, down to the bare Exception
        raise CheckpointError(f"{folder} cannot be read: {error}") from error


def read_tensors(
    folder: Path, into: Mapping[str, Tensor], group: ProcessGroup | None = None
) -> None:
    """Read tensors into others of the same shapes.

    Args:
        folder: of `write_tensors`, by any number of ranks.
        into: the same names on all ranks of the group.
        group: the ranks that call this together; None is this process only.
    """
    if not into:
        return
    reader = HuggingFaceStorageReader(str(folder))
    with _clear_messages(group):
        load(dict(into), storage_reader=reader, process_group=group, no_dist=group is None)


@contextmanager
def _clear_messages(group: ProcessGroup | None) -> Iterator[None]:
    """DCP's error is not an `Exception`, and its text is the tracebacks of all ranks.

    It also warns of what it is told to do; a thread cannot catch warnings only for itself.
    """
    message = "torch.distributed is disabled, unavailable or uninitialized"
    warnings.filterwarnings("ignore", message=message, category=UserWarning)
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        where = "" if group is None else f" (rank {distributed.get_global_rank(group, rank)})"
        raise CheckpointError(f"{cause}{where}") from error


def _file_numbers(tensors: Mapping[str, Tensor], ranks: int) -> dict[str, int]:
    """For each tensor the number of its file, from 1 on, each of about `FILE_BYTES`."""
    numbers, filled = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + filled // FILE_BYTES
        filled += tensor.nbytes // (ranks if is_sharded(tensor) else 1)
    return numbers


def _with_memory_of_their_own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Safetensors takes contiguous tensors that share no storage."""
    seen: set[int] = set()
    copies = {}
    for name, tensor in tensors.items():
        part, copies[name] = local(tensor), tensor.detach()
        storage = part.untyped_storage()
        is_view = storage.nbytes() != part.nbytes or storage.data_ptr() in seen
        seen.add(storage.data_ptr())
        if is_view or not part.is_contiguous():
            copies[name] = copies[name].clone(memory_format=torch.contiguous_format)
    return copies
