"""How a wrapped checkpoint on disk becomes a dense one, without its model or its code.

It holds a part of one stack at a time. A checkpoint under `fuse_on="step"` is dense already but for
the entries of its fusion weights, which are left out.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ...expert_config import ENTRY
from ...tensors import functional
from ..files.reader import CONFIG, CheckpointReader, read_config
from ..files.safetensors_writer import SafetensorsWriter
from .wrapped_layout import FusedTensor, WrappedLayout

PART_BYTES = 2**22
"""How much of a stack is fused at a time, less than which would be slow."""


@torch.no_grad()
def fuse_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Fuse a wrapped checkpoint on disk into a dense one, without building the model.

    Args:
        checkpoint: a safetensors or torch file, or a folder with one or with shards and their
            index, and config.json beside it as `save_config` writes it.
        out: a new folder, for model.safetensors and the rest of config.json, or a new file that
            ends in ".safetensors". It appears when all is written.
        progress: called with the bytes that were written just now, and those there are in all.

    Returns:
        The path of the safetensors file.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete, or does not fit its config.json.
        ValueError: `out` exists already, or a fused tensor holds NaN or inf.
    """
    out = Path(out)
    _refuse_existing(out)
    reader = CheckpointReader(Path(checkpoint))
    config = read_config(reader.folder)
    entry = config.pop(ENTRY, None)
    layout = WrappedLayout(reader, reader.entry or entry)
    layout.warn_of_empty_banks()
    with _appearing(out) as file:
        if config and file.name != out.name:
            (file.parent / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        with SafetensorsWriter(file, layout.dense) as writer:
            total = sum(spec.nbytes for spec in layout.dense.values())
            for name in writer.order:
                for part in _parts(reader, layout, name):
                    _refuse_non_finite(name, part, name in layout.fused)
                    writer.write(part)
                    if progress is not None:
                        progress(part.nbytes, total)
    return out if out.suffix == ".safetensors" else out / file.name


def _parts(reader: CheckpointReader, layout: WrappedLayout, name: str) -> Iterator[Tensor]:
    """A dense tensor in parts along its first dimension."""
    spec = layout.dense[name]
    if not spec.shape:
        yield reader.read(name)
        return
    fused = layout.fused.get(name)
    weights = None if fused is None else layout.fusion_weights(fused)
    copies = 1 if fused is None else fused.num_experts
    itemsize = max(4, spec.dtype.itemsize)  # low precision is summed in float32
    row_bytes = copies * itemsize * torch.Size(spec.shape[1:]).numel()
    rows = max(1, PART_BYTES // max(1, row_bytes))
    for start in range(0, spec.shape[0], rows):
        part = slice(start, start + rows)
        if fused is None or weights is None:
            with reader.open(name) as tensor:
                yield tensor[part]
        else:
            yield _fused_part(reader, fused, weights, part)


def _fused_part(
    reader: CheckpointReader, fused: FusedTensor, weights: Tensor, part: slice
) -> Tensor:
    """Some rows of a fused tensor."""
    with reader.open(fused.stack) as stack:
        rows: Tensor = stack[:, part]
        return functional.fuse(rows, weights)


def _refuse_non_finite(name: str, tensor: Tensor, is_fused: bool) -> None:
    if is_fused and not torch.isfinite(tensor).all():
        raise ValueError(
            f"{name}: the experts or their fusion weights hold NaN or inf. "
            "Fuse the last good checkpoint."
        )


def _refuse_existing(out: Path) -> None:
    is_empty_folder = out.is_dir() and not out.is_symlink() and not any(out.iterdir())
    if (out.exists() or out.is_symlink()) and not (is_empty_folder and out.resolve() != Path.cwd()):
        raise ValueError(f"{out} exists already. Name a new one.")
    if out.is_dir() and out.suffix == ".safetensors":
        raise ValueError(f"{out} is a folder. Name a file.")
    if out.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise ValueError(f"{out} is no folder's name and no .safetensors file, which is written.")


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A file to write to, which appears as `out` or in it if all goes well, else leaves nothing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        if out.suffix == ".safetensors":
            yield folder / out.name
            os.replace(folder / out.name, out)
        else:
            yield folder / "model.safetensors"
            folder.chmod(0o777 & ~_umask())
            os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
