"""Wrapped checkpoints on disk: what they are, and how they become dense without their model.

The names in a wrapped checkpoint do not say which linears share fusion weights, so `save_config`
writes that into the config.json beside it. `fuse_checkpoint` then needs neither the model nor its
code. It holds a part of one stack at a time.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .checkpoint_reader import (
    CONFIG,
    ENTRY,
    CheckpointError,
    CheckpointReader,
    read_config,
)
from .dtypes import accumulation_dtype
from .fusion_weights import FusionWeights
from .names import clean_name
from .parametrization import fused_names, fusion_weights_of, groups_of
from .safetensors_writer import SafetensorsWriter
from .shards import local
from .state_dict import dense_keys
from .wrapped_layout import FusedTensor, WrappedLayout

__all__ = ["CheckpointError", "describe", "fuse_checkpoint", "save_config"]

PART_BYTES = 2**22
"""How much of a stack is fused at a time, less than which would be slow."""


def describe(model: nn.Module) -> dict[str, Any]:
    """What a wrapped model's tensors are, as plain values for JSON or a torch checkpoint.

    Returns:
        `version`; `wraps`, for each method and config the FFN groups with their linears and fused
        tensors; `keys`, those of the dense state dict; `tied`, lists of keys that are one tensor.

    Raises:
        ValueError: nothing is wrapped.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    group_names = groups_of(model)
    wraps: list[dict[str, Any]] = []
    for weights, linears in _linears_of_groups(model).items():
        config = weights.config.to_dict()
        wrap = next((wrap for wrap in wraps if wrap["config"] == config), None)
        if wrap is None:
            method = weights.config.label.split()[0]
            wraps.append(wrap := {"method": method, "config": config, "groups": []})
        wrap["groups"].append({"name": group_names[weights], "linears": linears})
    if not wraps:
        raise ValueError(f"{type(model).__name__} has no wrapped linear to describe.")
    keys = [clean_name(key) for key in dense_keys(model)]
    return {"version": 1, "wraps": wraps, "keys": keys, "tied": _tied_names(model)}


def _linears_of_groups(model: nn.Module) -> dict[FusionWeights, dict[str, list[str]]]:
    """For each group its linears' names, all of them where a module has several, and tensors."""
    groups: dict[FusionWeights, dict[str, list[str]]] = defaultdict(dict)
    for fqn, linear in model.named_modules(remove_duplicate=False):
        if names := fused_names(linear):
            groups[fusion_weights_of(linear)][clean_name(fqn)] = names
    return groups


def _tied_names(model: nn.Module) -> list[list[str]]:
    """Names of the same memory in the state dict, of which a file may hold one."""
    owners: dict[Any, list[str]] = defaultdict(list)
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and local(value).numel() > 0 and not value.is_meta:
            key = (local(value).data_ptr(), value.shape, value.dtype)
            owners[key].append(clean_name(name))
    return [names for names in owners.values() if len(names) > 1]


def save_config(model: nn.Module, folder: str | Path) -> Path:
    """Say in a folder's config.json how its wrapped checkpoint is to be fused.

        save_file(model.state_dict(), "run/model.safetensors")  # or torch.save, or a trainer
        save_config(model, "run")
        # exfusion fuse run dense

    Args:
        model: the wrapped model whose state dict is in the folder.
        folder: of the checkpoint; what its config.json holds already stays.

    Returns:
        The path of config.json.

    Raises:
        ValueError: nothing is wrapped, or the config.json is no JSON object.
    """
    entry = describe(model)
    path = Path(folder, CONFIG)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = read_config(path.parent) | {ENTRY: entry}
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(partial, path)
    return path


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
        if fused.displacement is None or fused.decay is None:
            rows: Tensor = stack[:, part]
            return functional.fuse(rows if fused.dtype is None else rows.to(fused.dtype), weights)
        experts: Tensor = stack[:, part].to(accumulation_dtype(stack[:, part].dtype))
    with reader.open(fused.displacement) as displacement:
        shared: Tensor = displacement[part]
    total = reader.read(fused.decay) * functional.fuse(experts, weights) + weights.sum() * shared
    return total.to(shared.dtype)


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
