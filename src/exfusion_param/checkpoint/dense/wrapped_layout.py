"""Which tensors of a wrapped checkpoint make up which dense tensor, checked before any is read.

Under `fuse_on="forward"` a stack and the group's fusion weights do. Under "step" the dense tensors
are there, beside the fusion weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...config import ExFusionConfig
from ...finding.outer_modules import listed
from ...tensors.expert_starts import uniform_weights
from ...tensors.precision import accumulation_dtype
from ..files.errors import CheckpointError
from ..files.reader import CheckpointReader

_OWN_TENSORS = {"sw": (), "dw": ("weights",), "mb": ("bank", "router")}
"""The names of a group's tensors; the first are the fusion weights to ship."""

DDP = "module."
"""The prefix that DistributedDataParallel adds to every name."""


class FusedTensor(NamedTuple):
    """Where a fused tensor comes from.

    Args:
        stack: name of the expert stack.
        weights: name of the fusion weights; None are static ones.
        num_experts: N.
    """

    stack: str
    weights: str | None
    num_experts: int


class WrappedLayout:
    """The dense tensors of a wrapped checkpoint.

    Attributes:
        dense: every dense tensor, without memory.
        fused: those of them that are fused.

    Raises:
        CheckpointError: the entry is missing or malformed, or names and shapes do not fit it.
    """

    def __init__(self, reader: CheckpointReader, entry: Any) -> None:
        if entry is None:
            raise CheckpointError(
                f"{reader.folder} does not describe how it is fused: its config.json is missing or "
                'has no "exfusion". Write it with '
                "exfusion_param.checkpoint.save_config(model, folder)."
            )
        self.fused: dict[str, FusedTensor] = {}
        self._left_out: set[str] = set()  # routers, banks and learned weights
        self._reader = reader
        try:
            keys, tied = self._read_entry(entry)
        except CheckpointError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f'"exfusion" in {reader.folder}/config.json is malformed: {error}'
            ) from error
        sources = {key: self.fused[key].stack if key in self.fused else key for key in keys}
        self._check_names(self._left_out | set(sources.values()), tied)
        for fused in self.fused.values():
            self._check_stack(fused)
        self.dense = {
            key: reader.specs[source][0] if key in self.fused else reader.specs[source]
            for key, source in sources.items()
            if source in reader.specs  # of tied tensors a checkpoint may hold one
        }

    def fusion_weights(self, fused: FusedTensor) -> Tensor:
        """The fusion weights to ship, shape (N,)."""
        if fused.weights is not None:
            return self._reader.mapped(fused.weights)
        dtype = accumulation_dtype(self._reader.specs[fused.stack].dtype)
        return uniform_weights(fused.num_experts, torch.device("cpu"), dtype)

    def warn_of_empty_banks(self) -> None:
        """Warn if what is about to be shipped is multiplied by zero."""
        names = {fused.weights for fused in self.fused.values() if fused.weights is not None}
        names |= {name for name in self._left_out if name.endswith(".bank")}
        if empty := sorted(name for name in names if not self._reader.mapped(name).any()):
            warnings.warn(
                f"{listed(empty)}: the fusion weights are all zero, and so are the fused weights. "
                "Train some steps first.",
                stacklevel=3,
            )

    def _read_entry(self, entry: Any) -> tuple[list[str], list[set[str]]]:
        """The keys of the dense model, and those of them that are one tensor."""
        keys, tied = list(map(str, entry["keys"])), list(map(set, entry["tied"]))
        has_prefix = all(name.startswith(DDP) for name in self._reader.specs)
        if has_prefix and not any(key.startswith(DDP) for key in keys):
            self._reader.drop_prefix(DDP)
        if entry["version"] != 1:
            raise CheckpointError(
                f"The checkpoint's config.json has version {entry['version']!r}, this package "
                "knows 1. Update exfusion_param."
            )
        for wrap in entry["wraps"]:
            if wrap.get("method", "ExFusion") != "ExFusion":
                raise CheckpointError(
                    f"The checkpoint is one of {wrap['method']}, which has no dense form without "
                    "its model. Load it into the wrapped model, and call meo.fuse(model, task=...)."
                )
            config = ExFusionConfig.from_dict(wrap["config"])
            for group in wrap["groups"]:
                if config.fuse_on == "step":  # dense already, but for these
                    self._left_out |= set(map(str, group["fusion_weights"]))
                else:
                    self._read_group(group, config)
        if unlisted := [key for key in self.fused if key not in set(keys)]:
            raise ValueError(f"{listed(unlisted)} is not among its keys")
        return keys, tied

    def _read_group(self, group: Mapping[str, Any], config: ExFusionConfig) -> None:
        linears = {f"{fqn}." if fqn else "": names for fqn, names in group["linears"].items()}
        places = [f"{prefix}parametrizations.weight.0.fusion_weights." for prefix in linears]
        weights = None
        if own := _OWN_TENSORS[config.variant]:
            found = [place for place in places if place + own[0] in self._reader.specs]
            if not found:
                raise CheckpointError(
                    f"The checkpoint has no fusion weights for {group['name']!r}: "
                    f"{places[0]}{own[0]} is missing. Its config.json says {config.variant}."
                )
            weights = found[0] + own[0]
            self._left_out |= {place + name for place in found for name in own}
        for prefix, names in linears.items():
            for name in names:
                stack = f"{prefix}parametrizations.{name}.original"
                self.fused[prefix + name] = FusedTensor(stack, weights, config.num_experts)

    def _check_names(self, known: set[str], tied: list[set[str]]) -> None:
        specs = self._reader.specs
        if unknown := [name for name in specs if name not in known]:
            raise CheckpointError(
                f"The checkpoint holds {listed(unknown)}, which the model of its config.json lacks."
            )
        there = set().union(*(names for names in tied if names & specs.keys()))
        if missing := sorted(known - specs.keys() - there):
            raise CheckpointError(f"The checkpoint lacks {listed(missing)}.")

    def _check_stack(self, fused: FusedTensor) -> None:
        """Raise if a stack, or its fusion weights, are not of N experts."""
        for name, dims in ((fused.weights, 1), (fused.stack, 2)):
            spec = self._reader.specs.get(name or "")
            if spec is None:  # static, or another name of a tied tensor
                continue
            if not spec.dtype.is_floating_point or spec.dtype.itemsize < 2:
                raise CheckpointError(f"{name} is {spec.dtype}, not a trained dtype.")
            if spec.shape[:1] != (fused.num_experts,) or min(spec.ndim, 2) != dims:
                raise CheckpointError(
                    f"{name} has shape {tuple(spec.shape)}, config.json says {fused.num_experts} "
                    "experts."
                )
