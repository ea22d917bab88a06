"""State that is saved besides the parts: random numbers, and gradients that wait for a step."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ...fusion.lookup import groups_of
from ...fusion_weights.memory_bank import MemoryBank
from ...tensors.fsdp_groups import param_groups_of
from ...tensors.shards import is_sharded
from ..files.errors import CheckpointError
from ..files.plain_values import same
from .fitting import common
from .parts import Part

RANDOM_NUMBERS = "random_numbers"


class RandomNumbers(Part):
    """The generators of torch (CPU and the current GPU), Python and numpy, of each rank."""

    def __init__(self) -> None:
        super().__init__(RANDOM_NUMBERS)

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


class Accumulated(Part):
    """Gradients that wait for an optimizer's step, and what memory banks have counted with them.

    A checkpoint between two steps holds none, if gradients were reset after the first. A model that
    has another number of experts by now drops them all: a part of a batch is none.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(f"{name}.gradients")
        self._module = module

    def tensors(self) -> dict[str, Tensor]:
        """Sharded gradients."""
        sharded = (child for child in self._module.modules() if isinstance(child, FSDPModule))
        if any(map(has_unreduced_gradients, sharded)):
            raise CheckpointError(
                "gradients of this step were not reduced yet (set_requires_gradient_sync(False)). "
                "Save between two optimizer steps."
            )
        return {name: grad for name, grad in self._gradients() if is_sharded(grad)}

    def values(self) -> Any:
        """Plain gradients, and the sums of the banks."""
        plain = {name: grad for name, grad in self._gradients() if not is_sharded(grad)}
        for _, bank in self._banks():
            bank.votes.drop_unapplied()  # what the next backward would drop
        counted = {name: bank.votes.total for name, bank in self._banks()}
        return {"plain": plain, "counted": counted, "experts": self._experts()}

    def merged(self, values: Sequence[Any], rank: int) -> Any:
        """Gradients that all ranks had; sums of the banks, if they differ, spread evenly."""
        plain = common(self.name, [value["plain"] for value in values])
        every = [value["counted"] for value in values]
        counted = every[0]
        if not all(same(other, counted) for other in every):
            counted = {name: _mean(value[name] for value in every) for name in counted}
        return {"plain": plain, "experts": values[0]["experts"], "counted": counted}

    def allocate(self, stored: Mapping[str, Tensor], values: Any) -> dict[str, Tensor]:
        """Tensors like the parameters."""
        parameters = dict(self._module.named_parameters())
        if unknown := [n for n in (*stored, *values["plain"]) if n not in parameters]:
            raise CheckpointError(f"{self.name}: the model has no parameter {unknown[0]}.")
        if values["experts"] == self._experts():
            return {name: self.room(name, parameters[name], spec) for name, spec in stored.items()}
        totals = [total for total in values["counted"].values() if total is not None]
        if stored or values["plain"] or any(total[-1] > 0 for total in totals):
            warnings.warn(
                f"{self.name}: gradients and router outputs that waited for an optimizer's step "
                "are dropped, as the model has another number of experts than the checkpoint. The "
                "first step applies only what is accumulated from now on.",
                stacklevel=2,
            )
        return {}

    def load(self, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Set the gradients and the sums."""
        plain, counted = values["plain"], values["counted"]
        if values["experts"] != self._experts():
            tensors, plain, counted = {}, {}, {}
        for name, parameter in self._module.named_parameters():
            gradient = tensors.get(name, plain.get(name))
            # A copy, as kernels round by how memory is aligned, and a file's is aligned otherwise.
            parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)
        for name, bank in self._banks():
            total = counted.get(name)
            bank.votes.resume(None if total is None else total.to(bank.bank.device))

    def _experts(self) -> dict[str, int]:
        """The number of experts of each group."""
        groups = groups_of(self._module)
        return {name: group.config.num_experts for group, name in groups.items()}

    def _gradients(self) -> list[tuple[str, Tensor]]:
        named = self._module.named_parameters()
        return [(name, p.grad) for name, p in named if p.grad is not None]

    def _banks(self) -> list[tuple[str, MemoryBank]]:
        groups = groups_of(self._module).items()
        return [(name, bank) for bank, name in groups if isinstance(bank, MemoryBank)]


def has_unreduced_gradients(module: FSDPModule) -> bool:
    """Whether a module that FSDP2 shards waits to reduce; torch has no public name for it."""
    try:
        groups = param_groups_of(module._get_fsdp_state())
        parameters = [parameter for group in groups for parameter in group.fsdp_params]
        return any(_has_unreduced_gradient(parameter) for parameter in parameters)
    except AttributeError as error:
        raise CheckpointError(
            f"FSDP2 of torch {torch.__version__} keeps unreduced gradients elsewhere than this "
            f"version of exfusion_param looks for them ({error}), so a checkpoint could lose them. "
            "Update exfusion_param, or use a torch version that its metadata allows."
        ) from error


def _has_unreduced_gradient(parameter: Any) -> bool:
    """Whether an FSDPParam holds a gradient, by itself or in `reduce_dtype`."""
    if not hasattr(type(parameter), "unsharded_param"):
        raise AttributeError("an FSDPParam has no unsharded_param")
    gathered = getattr(parameter, "unsharded_param", None)  # not there before a first forward
    held = (parameter.unsharded_accumulated_grad, None if gathered is None else gathered.grad)
    return any(gradient is not None for gradient in held)


def _mean(totals: Iterable[Tensor | None]) -> Tensor | None:
    """Each rank's share of the votes: a micro-batch of all ranks has as many as there are ranks."""
    totals = list(totals)
    counted = [total for total in totals if total is not None]
    return torch.stack(counted).sum(dim=0) / len(totals) if counted else None
