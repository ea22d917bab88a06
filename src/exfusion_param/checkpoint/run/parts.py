"""What a run consists of, and how each part of it is saved and loaded.

A part has tensors, which ranks spread among them and which load on any number of ranks, and values,
which are each rank's own. It first says whether what was saved fits, and is changed only then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...finding.outer_modules import listed, unwrapped
from ..files.errors import CheckpointError
from ..files.plain_values import same
from ..files.tensor_spec import TensorSpec


class Part(Protocol):
    """One part of a run.

    Attributes:
        name: what the user calls it, and its folder in a checkpoint.
    """

    name: str

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, DTensors or alike on all ranks; the same names on all ranks."""

    def values(self) -> Any:
        """What else this rank has: nested plain values and tensors."""

    def merged(self, values: Sequence[Any], rank: int) -> Any:
        """The values of a rank, from those of another number of ranks.

        Raises:
            CheckpointError: they cannot be merged.
        """

    def room_for(self, stored: Mapping[str, TensorSpec], values: Any) -> dict[str, Tensor]:
        """Empty tensors to read the stored ones into.

        Raises:
            CheckpointError: what is stored does not fit.
        """

    def load(self, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Become what was saved."""


class Stateful:
    """Anything with `state_dict` and `load_state_dict`: schedulers, scalers, data loaders."""

    def __init__(self, name: str, owner: Any) -> None:
        self.name = name
        self._owner = owner

    def tensors(self) -> dict[str, Tensor]:
        """None: each rank has its own state."""
        return {}

    def values(self) -> Any:
        """The state dict."""
        return self._owner.state_dict()

    def merged(self, values: Sequence[Any], rank: int) -> Any:
        """The values that all ranks had."""
        return common(self.name, values)

    def room_for(self, stored: Mapping[str, TensorSpec], values: Any) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load(self, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Load the state dict."""
        self._owner.load_state_dict(values)


class Module:
    """A model, wrapped or not, under DDP or FSDP2, or compiled."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = unwrapped(module)
        kinds = {type(child).__name__ for child in self.module.modules()}
        if "FullyShardedDataParallel" in kinds:
            raise ValueError(f"{name} is under FSDP1. Shard it with exfusion_param.fully_shard.")

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the state dict, tied ones once."""
        aliases = self._aliases()
        return {
            name: value
            for name, value in self.module.state_dict().items()
            if isinstance(value, Tensor) and name not in aliases
        }

    def values(self) -> Any:
        """What else is in the state dict, such as `get_extra_state` gives."""
        state = self.module.state_dict()
        return {name: value for name, value in state.items() if not isinstance(value, Tensor)}

    def merged(self, values: Sequence[Any], rank: int) -> Any:
        """The values that all ranks had."""
        return common(self.name, values)

    def room_for(self, stored: Mapping[str, TensorSpec], values: Any) -> dict[str, Tensor]:
        """Tensors like the model's own."""
        if set(values) != set(self.values()):
            raise CheckpointError(f"{self.name}: the checkpoint has other values: {list(values)}.")
        own = self.tensors()
        refuse_other_names(self.name, own, stored)
        if any(tensor.is_meta for tensor in own.values()):
            raise CheckpointError(
                f"{self.name} is on the meta device. Give it memory first: to_empty(device=...)."
            )
        for name, tensor in own.items():
            refuse_other_shape(f"{self.name}: {name}", tensor, stored[name])
        return {name: like(tensor, stored[name]) for name, tensor in own.items()}

    def load(self, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Load the state dict."""
        tied = {alias: tensors[name] for alias, name in self._aliases().items()}
        self.module.load_state_dict({**tensors, **tied, **values})

    def _aliases(self) -> dict[str, str]:
        """Names in the state dict of a tensor that has another name before."""
        first: dict[int, str] = {}
        kept = self.module.state_dict(keep_vars=True)
        names = {name: first.setdefault(id(value), name) for name, value in kept.items()}
        return {name: other for name, other in names.items() if name != other}


def common(name: str, values: Sequence[Any]) -> Any:
    """The values that all ranks had.

    Raises:
        CheckpointError: they differ.
    """
    if not all(same(value, values[0]) for value in values[1:]):
        raise CheckpointError(
            f"{name} is not the same on the {len(values)} ranks that saved it, so it only loads on "
            f"as many. Resume on {len(values)} ranks, or without it: "
            f"resume(leave_out=[{name!r}])."
        )
    return values[0]


def refuse_other_names(part: str, own: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> None:
    """Raise if a part has other tensors than were saved."""
    missing = [name for name in own if name not in stored]
    unknown = [name for name in stored if name not in own]
    kinds = ["step", "forward"]
    saved, here = (any(".parametrizations." in name for name in names) for names in (stored, own))
    if saved != here:
        raise CheckpointError(
            f'{part} was saved under fuse_on="{kinds[saved]}", or dense, and is wrapped with '
            f'"{kinds[here]}", which keeps its experts elsewhere. Wrap it as it was wrapped then, '
            "or fuse the checkpoint and load the dense one with load_dense_state_dict."
        )
    if missing or unknown:
        raise CheckpointError(
            f"{part}: the checkpoint is of another model. It lacks {listed(missing) or 'nothing'}, "
            f"and also holds {listed(unknown) or 'nothing'}."
        )


def refuse_other_shape(name: str, tensor: Tensor, stored: TensorSpec) -> None:
    """Raise if a tensor was saved in another shape."""
    shape = tuple(tensor.shape)
    if shape == stored.shape:
        return
    if shape[1:] == stored.shape[1:] and (".parametrizations." in name or "/experts" in name):
        raise CheckpointError(
            f"{name} was saved with {stored.shape[0]} experts, the model has {shape[0]}. Wrap it "
            f"with num_experts={stored.shape[0]}, or resume(resize_experts=True) expands or "
            "reduces them without changing the fused weights."
        )
    raise CheckpointError(
        f"{name} was saved in shape {stored.shape}, and is of shape {shape} here."
    )


def like(tensor: Tensor, stored: TensorSpec) -> Tensor:
    """Room for what was stored, spread over the ranks as `tensor` is."""
    return torch.empty_like(tensor.detach(), dtype=stored.dtype)
