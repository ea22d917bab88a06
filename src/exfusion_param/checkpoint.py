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
from .checkpoint_reader import CONFIG, ENTRY, CheckpointError, CheckpointReader, read_config
from .parametrization import fused_names, fusion_weights_of, groups_of
from .safetensors_writer import SafetensorsWriter
from .state_dict import dense_keys
from .wrapped_layout import WrappedLayout

__all__ = ["CheckpointError", "describe", "fuse_checkpoint", "save_config"]

PART_BYTES = 2**22
"""How much of a stack is fused at a time, less than which would be slow."""


def describe(model: nn.Module) -> dict[str, Any]:
    """What a wrapped model's tensors are, as plain values for JSON or a torch checkpoint.

    Returns:
        `version`; `wraps`, for each config the FFN groups with their linears and fused tensors;
        `keys`, those of the dense state dict; `tied`, lists of keys that are one tensor.

    Raises:
        ValueError: nothing is wrapped.
    """
    group_names = groups_of(model)
    wraps: list[dict[str, Any]] = []
    for fqn, linear in model.named_modules(remove_duplicate=False):
        if names := fused_names(linear):
            weights = fusion_weights_of(linear)
            config = weights.config.to_dict()
            wrap = next((wrap for wrap in wraps if wrap["config"] == config), None)
            if wrap is None:
                wraps.append(wrap := {"config": config, "groups": {}})
            wrap["groups"].setdefault(group_names[weights], {})[fqn] = names
    if not wraps:
        raise ValueError(f"{type(model).__name__} has no wrapped linear to describe.")
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    tied = [names for names in owners.values() if len(names) > 1]
    return {"version": 1, "wraps": wraps, "keys": dense_keys(model), "tied": tied}


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
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists already. Name a new one.")
    reader = CheckpointReader(Path(checkpoint))
    config = read_config(reader.folder)
    layout = WrappedLayout(reader, config.pop(ENTRY, None) or reader.entry)
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
    """A dense tensor, in parts along its first dimension if it is fused from a stack."""
    if name not in layout.fused:
        yield reader.read(name)
        return
    fused = layout.fused[name]
    weights = layout.fusion_weights(fused)
    spec = reader.specs[fused.stack]
    rows = max(1, PART_BYTES * spec.shape[1] // max(1, spec.nbytes))
    for start in range(0, spec.shape[1], rows):
        with reader.open(fused.stack) as stack:
            yield functional.fuse(stack[:, start : start + rows], weights)


def _refuse_non_finite(name: str, tensor: Tensor, is_fused: bool) -> None:
    if is_fused and not torch.isfinite(tensor).all():
        raise ValueError(
            f"{name}: the experts or their fusion weights hold NaN or inf. "
            "Fuse the last good checkpoint."
        )


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
