"""Which tensors of a wrapped checkpoint make up which dense tensor, checked before any is read.

Under `fuse_on="forward"` a stack and the group's fusion weights do. Under "step" the dense tensors
are there, beside the fusion weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...config import ExFusionConfig
from ...finding.outer_modules import listed
from ...tensors.expert_starts import uniform_weights
from ...tensors.precision import accumulation_dtype
from ..files.errors import CheckpointError
from ..files.reader import CheckpointReader
from ..files.tensor_spec import TensorSpec

_OWNED = {"sw": None, "dw": "weights", "mb": "bank"}
"""The tensor that holds the fusion weights to ship."""


DDP = "module."
"""What DistributedDataParallel puts before every name."""


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

    Args:
        reader: the checkpoint.
        entry: what `checkpoint.describe` gave for the model.

    Attributes:
        dense: shape and dtype of every dense tensor.
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
        self.fusion_weights_on_step: set[str] = set()
        self._reader = reader
        self._expected: set[str] = set()
        try:
            keys, tied = self._read_entry(entry)
        except CheckpointError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f'"exfusion" in {reader.folder}/config.json is malformed: {error}'
            ) from error
        self._check_names(reader.specs, {key for key in keys if key not in self.fused}, tied)
        self._check_stacks(reader.specs)
        sources = {key: self.fused[key].stack if key in self.fused else key for key in keys}
        self.dense = {
            key: self._dense_spec(key)
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
        names |= {name for name in self.fusion_weights_on_step if name.endswith(".bank")}
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
        self._read_groups(self._reader.specs, entry)
        self._expected |= self.fusion_weights_on_step
        if unlisted := [key for key in self.fused if key not in set(keys)]:
            raise ValueError(f"{listed(unlisted)} is not among its keys")
        return keys, tied

    def _read_groups(self, specs: Mapping[str, TensorSpec], entry: Any) -> None:
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
                    self.fusion_weights_on_step |= set(map(str, group["fusion_weights"]))
                else:
                    self._read_group(specs, group, config)

    def _read_group(
        self, specs: Mapping[str, TensorSpec], group: Mapping[str, Any], config: ExFusionConfig
    ) -> None:
        weights = self._owned(specs, group["name"], group["linears"], config)
        for fqn, names in group["linears"].items():
            for name in names:
                stack = _join(fqn, f"parametrizations.{name}.original")
                self._expected.add(stack)
                self.fused[_join(fqn, name)] = FusedTensor(stack, weights, config.num_experts)

    def _owned(
        self,
        specs: Mapping[str, TensorSpec],
        group: str,
        linears: Iterable[str],
        config: ExFusionConfig,
    ) -> str | None:
        """The name of a group's fusion weights; one of its linears holds them."""
        tensor = _OWNED[config.variant]
        if tensor is None:
            return None
        places = [_join(fqn, "parametrizations.weight.0.fusion_weights.") for fqn in linears]
        found = [place for place in places if place + tensor in specs]
        if not found:
            raise CheckpointError(
                f"The checkpoint has no fusion weights for {group!r}: {places[0]}{tensor} is "
                f"missing. Its config.json says {config.variant}."
            )
        names = {f"{place}{name}" for place in found for name in (tensor, "router")}
        self._expected |= names if config.variant == "mb" else {place + tensor for place in found}
        shape = specs[found[0] + tensor].shape
        if shape != (config.num_experts,):
            raise _wrong_number(found[0] + tensor, shape, config.num_experts)
        return found[0] + tensor

    def _check_names(
        self, specs: Mapping[str, TensorSpec], plain: set[str], tied: list[set[str]]
    ) -> None:
        known = self._expected | plain
        if unknown := [name for name in specs if name not in known]:
            raise CheckpointError(
                f"The checkpoint holds {listed(unknown)}, which the model of its config.json lacks."
            )
        there = set().union(*(names for names in tied if names & specs.keys()))
        if missing := sorted(known - specs.keys() - there):
            raise CheckpointError(f"The checkpoint lacks {listed(missing)}.")

    def _check_stacks(self, specs: Mapping[str, TensorSpec]) -> None:
        for fused in self.fused.values():
            for name in {fused.stack, fused.weights or fused.stack} & specs.keys():
                if not specs[name].dtype.is_floating_point or specs[name].dtype.itemsize < 2:
                    raise CheckpointError(f"{name} is {specs[name].dtype}, not a trained dtype.")
            shape = specs[fused.stack].shape if fused.stack in specs else (fused.num_experts, 1)
            if shape[:1] != (fused.num_experts,) or len(shape) < 2:
                raise _wrong_number(fused.stack, shape, fused.num_experts)

    def _dense_spec(self, key: str) -> TensorSpec:
        if key not in self.fused:
            return self._reader.specs[key]
        stack = self._reader.specs[self.fused[key].stack]
        return TensorSpec(stack.shape[1:], stack.dtype)


def _wrong_number(name: str, shape: tuple[int, ...], num_experts: int) -> CheckpointError:
    return CheckpointError(
        f"{name} has shape {tuple(shape)}, config.json says {num_experts} experts."
    )


def _join(fqn: str, name: str) -> str:
    return f"{fqn}.{name}" if fqn else name
