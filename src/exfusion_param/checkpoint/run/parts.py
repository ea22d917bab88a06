"""The parts of a run, and how each of them is saved and loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...finding.outer_modules import unwrapped
from ..files.errors import CheckpointError
from .fitting import common, refuse_other_names, refuse_other_shape


class Part(ABC):
    """One part of a run; unless it has its own way, of values that are alike on all ranks.

    Args:
        name: what the user calls it, and its folder in a checkpoint.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def holds(self) -> list[str]:
        """Names that tell it from a part of another model."""
        return []

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, DTensors or alike on all ranks; the same names on all ranks."""
        return {}

    @abstractmethod
    def values(self) -> Any:
        """What else this rank has: nested plain values and tensors."""

    def merged(self, values: Sequence[Any], rank: int) -> Any:
        """The values of a rank, from those of another number of ranks.

        Raises:
            CheckpointError: they cannot be merged.
        """
        return common(self.name, values)

    def allocate(self, stored: Mapping[str, Tensor], values: Any) -> dict[str, Tensor]:
        """Allocate tensors to load the stored ones into.

        Raises:
            CheckpointError: what is stored does not fit.
        """
        return {}

    def room(self, name: str, tensor: Tensor, stored: Tensor) -> Tensor:
        """An empty tensor to read a stored one into that is to become `tensor`."""
        refuse_other_shape(f"{self.name}: {name}", tensor, stored)
        return torch.empty_like(tensor.detach(), dtype=stored.dtype)

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Become what was saved."""


class Stateful(Part):
    """Anything with `state_dict` and `load_state_dict`: schedulers, scalers, data loaders."""

    def __init__(self, name: str, owner: Any) -> None:
        super().__init__(name)
        self._owner = owner

    def values(self) -> Any:
        """The state dict."""
        return self._owner.state_dict()

    def load(self, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Load the state dict."""
        self._owner.load_state_dict(values)


class Module(Part):
    """A model, wrapped or not, under DDP or FSDP2, or compiled."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name)
        self.module = unwrapped(module)
        kinds = {type(child).__name__ for child in self.module.modules()}
        if "FullyShardedDataParallel" in kinds:
            raise ValueError(f"{name} is under FSDP1. Shard it with exfusion_param.fully_shard.")

    def holds(self) -> list[str]:
        """The keys of the state dict."""
        return list(self.module.state_dict(keep_vars=True))

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

    def allocate(self, stored: Mapping[str, Tensor], values: Any) -> dict[str, Tensor]:
        """Tensors like the model's own."""
        if set(values) != set(self.values()):
            raise CheckpointError(f"{self.name}: the checkpoint has other values: {list(values)}.")
        tensors = self.tensors()
        refuse_other_names(self.name, tensors, stored)
        if any(tensor.is_meta for tensor in tensors.values()):
            raise CheckpointError(
                f"{self.name} is on the meta device. Give it memory first: to_empty(device=...)."
            )
        return {name: self.room(name, tensor, stored[name]) for name, tensor in tensors.items()}

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
