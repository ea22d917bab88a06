"""What a run has besides its parts: random numbers, and gradients that wait for a step."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...fusion.lookup import groups_of
from ...fusion_weights.memory_bank import MemoryBank
from ...tensors.shards import is_sharded
from ..files.errors import CheckpointError
from ..files.plain_values import same
from ..files.tensor_spec import TensorSpec
from .parts import common, like, refuse_other_shape


class RandomNumbers:
    """The generators of torch (CPU and the current GPU), Python and numpy, of each rank."""

    name = "random_numbers"

    def tensors(self) -> dict[str, Tensor]:
        """None: each rank draws its own numbers."""
        return {}

    def values(self) -> Any:
        """The states of the generators."""
        states = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        if (numpy := sys.modules.get("numpy")) is not None:
            states["numpy"] = numpy.random.get_state()
        return states

    def merged(self, values: Sequence[Any], rank: int) -> Any:
        """The states of the rank, or for a rank that was not there a new seed."""
        if rank < len(values):
            return values[rank]
        return {"seed": int(values[0]["torch"].long().sum()) + rank}

    def room_for(self, stored: Mapping[str, TensorSpec], values: Any) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load(self, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Set the generators."""
        if "seed" in values:
            torch.manual_seed(values["seed"])
            random.seed(values["seed"])
            return
        torch.set_rng_state(values["torch"])
        random.setstate(values["python"])
        if "cuda" in values and torch.cuda.is_available():
            torch.cuda.set_rng_state(values["cuda"])
        if "numpy" in values:
            import numpy as np

            kind, keys, *rest = values["numpy"]
            np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))


class Accumulated:
    """Gradients that wait for an optimizer's step, and what memory banks have counted with them.

    A checkpoint between two steps holds none, if gradients were reset after the first.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = f"{name}.gradients"
        self._module = module

    def tensors(self) -> dict[str, Tensor]:
        """Sharded gradients."""
        _refuse_unreduced(self._module)
        return {name: grad for name, grad in self._gradients() if is_sharded(grad)}

    def values(self) -> Any:
        """Plain gradients, and the sums of the banks."""
        plain = {name: grad for name, grad in self._gradients() if not is_sharded(grad)}
        counted = {name: bank.votes.total for name, bank in self._banks()}
        return {"plain": plain, "counted": counted}

    def merged(self, values: Sequence[Any], rank: int) -> Any:
        """Gradients that all ranks had; sums of the banks, if they differ, spread evenly."""
        plain = common(self.name, [value["plain"] for value in values])
        counted = [value["counted"] for value in values]
        if all(same(other, counted[0]) for other in counted):
            return {"plain": plain, "counted": counted[0]}
        means = {name: _mean(value[name] for value in counted) for name in counted[0]}
        return {"plain": plain, "counted": means}

    def room_for(self, stored: Mapping[str, TensorSpec], values: Any) -> dict[str, Tensor]:
        """Tensors like the parameters."""
        parameters = dict(self._module.named_parameters())
        if unknown := [n for n in (*stored, *values["plain"]) if n not in parameters]:
            raise CheckpointError(f"{self.name}: {unknown[0]} is no parameter here.")
        for name, spec in stored.items():
            refuse_other_shape(f"{self.name}: {name}", parameters[name], spec)
        return {name: like(parameters[name], spec) for name, spec in stored.items()}

    def load(self, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Set the gradients and the sums."""
        for name, parameter in self._module.named_parameters():
            gradient = tensors.get(name, values["plain"].get(name))
            # A copy, as kernels round by how memory is aligned, and a file's is aligned otherwise.
            copy = None if gradient is None else gradient.to(parameter.device, copy=True)
            parameter.grad = copy
        for name, bank in self._banks():
            total = values["counted"].get(name)
            bank.votes.resume(None if total is None else total.to(bank.bank.device))

    def _gradients(self) -> list[tuple[str, Tensor]]:
        named = self._module.named_parameters()
        return [(name, p.grad) for name, p in named if p.grad is not None]

    def _banks(self) -> list[tuple[str, MemoryBank]]:
        groups = groups_of(self._module).items()
        return [(name, bank) for bank, name in groups if isinstance(bank, MemoryBank)]


def _refuse_unreduced(module: nn.Module) -> None:
    """Raise if FSDP2 holds gradients that it has not given to the parameters."""
    for child in module.modules():
        state = getattr(child, "_get_fsdp_state", lambda: None)()
        group = getattr(state, "_fsdp_param_group", None)
        for parameter in getattr(group, "fsdp_params", ()):
            if parameter.unsharded_accumulated_grad is not None:
                raise CheckpointError(
                    "gradients of this step were not reduced yet "
                    "(set_requires_gradient_sync(False)). Save between two optimizer steps."
                )


def _mean(totals: Iterable[Tensor | None]) -> Tensor | None:
    """Each rank's share of the votes: a micro-batch of all ranks has as many as there are ranks."""
    totals = list(totals)
    counted = [total for total in totals if total is not None]
    return torch.stack(counted).sum(dim=0) / len(totals) if counted else None
