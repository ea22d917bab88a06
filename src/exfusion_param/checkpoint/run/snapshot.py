"""All parts of a run at one moment: captured to be saved, and what each is to load."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from ...finding.outer_modules import unwrapped
from ...fusion.lookup import groups_of
from ..dense.description import describe, write_description
from ..files.errors import CheckpointError
from ..files.plain_values import split
from ..files.processes import Processes
from ..files.rank_files import RANKS
from ..files.tensor_files import write_tensors
from .optimizer_part import OptimizerPart, parameter_names
from .parts import Module, Part, Stateful
from .running_parts import RANDOM_NUMBERS, Accumulated, RandomNumbers


class Plan(NamedTuple):
    """What a part is to load."""

    part: Part
    tensors: dict[str, Tensor]
    values: Any


def load_all(plans: Iterable[Plan]) -> None:
    """Load all parts; what was read fits them, as their plans have checked."""
    for plan in plans:
        try:
            plan.part.load(plan.tensors, plan.values)
        except Exception as error:
            message = f"{plan.part.name} does not take what was saved of it: {error}"
            raise CheckpointError(message) from error


class Captured:
    """All parts at one moment."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self.tensors = {part.name: part.tensors() for part in parts}
        self.rank_tensors: dict[str, Tensor] = {}
        self.rank_values = {p.name: split(p.values(), p.name, self.rank_tensors) for p in parts}
        self.descriptions = {
            part.name: describe(part.module)
            for part in parts
            if isinstance(part, Module) and groups_of(part.module)
        }

    def write(self, folder: Path, name: str, holders: Processes) -> None:
        """Write a part's tensors; beside those of a wrapped model, how they are fused."""
        write_tensors(folder / name, self.tensors[name], holders.group)
        if name in self.descriptions and holders.rank == 0:
            write_description(self.descriptions[name], folder / name)

    def copy_to_cpu(self) -> None:
        """Take copies, which the run no longer changes."""
        for tensors in (*self.tensors.values(), self.rank_tensors):
            tensors.update({name: _cpu_copy(tensor) for name, tensor in tensors.items()})


def _cpu_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def parts_of(
    named: Mapping[str, Any], module_kind: type[Module], optimizer_kind: type[OptimizerPart]
) -> list[Part]:
    """The parts by their kinds, and what a run has beyond them."""
    modules = {name: part for name, part in named.items() if isinstance(part, nn.Module)}
    names = parameter_names(modules)
    parts: list[Part] = []
    for name, part in named.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in (RANDOM_NUMBERS, RANKS):
            raise ValueError(f"{name!r} cannot name a part: take letters, digits, '_' and '-'.")
        if isinstance(part, nn.Module):
            parts.append(module_kind(name, part))
        elif isinstance(part, Optimizer):
            parts.append(optimizer_kind(name, part, names))
        elif hasattr(part, "state_dict") and hasattr(part, "load_state_dict"):
            parts.append(Stateful(name, part))
        else:
            raise ValueError(
                f"{name!r} is a {type(part).__name__}, which has no state_dict and load_state_dict."
            )
    accumulated = [Accumulated(name, unwrapped(module)) for name, module in modules.items()]
    return [*parts, *accumulated, RandomNumbers()]
