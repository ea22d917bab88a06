"""How a wrapped checkpoint on disk becomes a dense one, without its model or its code.

A checkpoint under `fuse_on="step"` is dense already but for the entries of its fusion weights,
which are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...atomic_files import PARTIAL, appearing
from ...expert_config import ENTRY
from ...tensors import functional
from ..files.errors import CheckpointError
from ..files.reader import CONFIG, CheckpointReader, read_config
from .wrapped_layout import WrappedLayout

SHARD_BYTES = 2**30
"""How large the files become, and so what is in memory of the dense model."""

PART_BYTES = 2**22
"""How much of a stack is fused at a time, less than which would be slow."""


@torch.no_grad()
def fuse_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Fuse a wrapped checkpoint on disk into a dense one, without building the model.

    Memory holds one file of the dense model, limited by `shard_bytes`, and a few tens of MiB. If
    several ranks wrote the checkpoint in pieces (`Checkpoints`, torch's distributed checkpoints),
    it also holds one full stack. A tensor larger than `shard_bytes` gets its own file.

    Args:
        checkpoint: a safetensors or torch file, or a folder with such a file, or with shards and
            their index. Its folder also has the config.json that `save_config` writes.
        out: a new folder, for config.json and model.safetensors, or for shards and
            model.safetensors.index.json, in the format of transformers; or a new file that ends in
            ".safetensors", for a model of one file. It appears only when it is complete.
        shard_bytes: the largest size of a file.
        progress: called for each tensor, with its bytes and those of all tensors.

    Returns:
        The path of the safetensors file, or of the index of several.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete, or does not match its config.json;
            or the dense one cannot be written.
        ValueError: `out` already exists, or is a file and the model needs several; or a fused
            tensor holds NaN or inf.
    """
    out = Path(out)
    _refuse_existing(out)
    reader = CheckpointReader(Path(checkpoint))
    config = read_config(reader.folder)
    entry = config.pop(ENTRY, None)
    layout = WrappedLayout(reader, reader.entry or entry)
    shards = _shards(layout.dense, shard_bytes)
    if out.suffix == ".safetensors" and len(shards) > 1:
        raise ValueError(
            f"{out} would be larger than shard_bytes={shard_bytes}, which are in memory at once. "
            f"Name a folder, for {len(shards)} files, or raise shard_bytes."
        )
    layout.warn_of_empty_banks()
    dense = _Dense(reader, layout, progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    with appearing(out) as partial:
        if out.suffix == ".safetensors":
            dense.write(partial, shards[0])
            return out
        partial.mkdir()
        if config:
            (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        return out / dense.write_folder(partial, shards)


class _Dense:
    """The tensors of the dense model."""

    def __init__(
        self,
        reader: CheckpointReader,
        layout: WrappedLayout,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._reader = reader
        self._layout = layout
        self._progress = progress
        self._nbytes = sum(spec.nbytes for spec in layout.dense.values())

    def write_folder(self, folder: Path, shards: list[list[str]]) -> str:
        """Write the files, and their index if there are several; the name of what to load."""
        if len(shards) == 1:
            self.write(folder / "model.safetensors", shards[0])
            return "model.safetensors"
        files: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self.write(folder / file, names)
            files |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._nbytes}, "weight_map": files}
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n")
        return path.name

    def write(self, path: Path, names: Iterable[str]) -> None:
        """Write a file of some of them."""
        from safetensors.torch import save_file

        tensors = {name: self._tensor(name) for name in names}
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except Exception as error:  # KeyError for a dtype, its own for a full disk
            raise CheckpointError(f"{path.name} cannot be written: {error}") from error

    def _tensor(self, name: str) -> Tensor:
        is_fused = name in self._layout.fused
        tensor = self._fused(name) if is_fused else self._reader.mapped(name).contiguous()
        if self._progress is not None:
            self._progress(tensor.nbytes, self._nbytes)
        return tensor

    def _fused(self, name: str) -> Tensor:
        fused, spec = self._layout.fused[name], self._layout.dense[name]
        weights = self._layout.fusion_weights(fused)
        dense = torch.empty(spec.shape, dtype=spec.dtype)
        itemsize = max(4, spec.dtype.itemsize)  # low precision is summed in float32
        row_bytes = fused.num_experts * itemsize * spec.shape[1:].numel()
        rows = max(1, PART_BYTES // max(1, row_bytes))
        for start in range(0, len(dense), rows):
            part = slice(start, start + rows)
            experts = self._reader.mapped(fused.stack)[:, part].contiguous()
            dense[part] = functional.fuse(experts, weights)
            if not dense[part].isfinite().all():
                raise ValueError(
                    f"{name}: the experts or their fusion weights hold NaN or inf. "
                    "Fuse the last good checkpoint."
                )
        return dense


def _shards(specs: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """Which tensors go to each file."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    return shards


def _refuse_existing(out: Path) -> None:
    is_empty_folder = out.is_dir() and not out.is_symlink() and not any(out.iterdir())
    if (out.exists() or out.is_symlink()) and not (is_empty_folder and out.resolve() != Path.cwd()):
        raise ValueError(f"{out} already exists. Choose another name.")
    if out.is_dir() and out.suffix == ".safetensors":
        raise ValueError(f"{out} is a folder, but its name is that of a file. Choose another name.")
    if out.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise ValueError(f"out must be a folder or a file that ends in .safetensors, got {out}.")
    partial = out.with_name(out.name + PARTIAL)
    if partial.exists():
        raise ValueError(f"{partial} exists, left by a run that was killed. Remove it first.")
