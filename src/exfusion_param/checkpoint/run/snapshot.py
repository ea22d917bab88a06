"""All parts of a run at one moment: captured to be saved, or stored in a checkpoint to load."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ...finding.outer_modules import unwrapped
from ...fusion.lookup import groups_of
from ..dense.description import describe, write_description
from ..files.errors import CheckpointError
from ..files.plain_values import split
from ..files.processes import Processes
from ..files.rank_files import RANKS, read_rank, write_rank
from ..files.tensor_files import read_tensors, stored_tensors, write_tensors
from .holders import Holders, saved_by
from .optimizer_part import OptimizerPart, parameter_names
from .parts import Module, Part, Stateful
from .resizing import ResizedModule, ResizedOptimizer
from .running_parts import RANDOM_NUMBERS, Accumulated, RandomNumbers


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

    def write_rank(self, folder: Path, rank: int) -> None:
        """Write what this rank has for itself."""
        write_rank(folder, rank, self.rank_values, self.rank_tensors)

    def copy_to_cpu(self) -> None:
        """Take copies, which the run no longer changes."""
        for tensors in (*self.tensors.values(), self.rank_tensors):
            for name, tensor in tensors.items():
                tensors[name] = tensor.detach().to("cpu", copy=True)


class Stored:
    """What a checkpoint holds of some parts of this rank; they change only at `load`.

    Raises:
        CheckpointError: it does not fit them.
    """

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], parts: list[Part], holders: Holders
    ) -> None:
        if missing := [part.name for part in parts if part.name not in manifest["parts"]]:
            raise CheckpointError(
                f"{folder} lacks {missing[0]!r}; it holds {manifest['parts']}. Resume without it: "
                f"resume(leave_out={missing})."
            )
        self._folder, self._parts = folder, parts
        self._values: dict[str, Any] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}
        values_of_rank = functools.cache(lambda rank: read_rank(folder, rank))
        try:
            for part in parts:
                those, saved = holders.processes[part.name], saved_by(part.name, manifest)
                is_same = len(saved) == those.count
                ranks = [saved[those.rank]] if is_same else saved
                every = [values_of_rank(rank)[part.name] for rank in ranks]
                values = every[0] if is_same else part.merged(every, those.rank)
                self._values[part.name] = values
                stored = stored_tensors(folder / part.name)
                self._tensors[part.name] = part.allocate(stored, values)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder} does not hold what a run saves: {error!r}") from error

    def read(self, name: str, holders: Processes) -> None:
        """Read a part's tensors, together with the ranks that hold it."""
        read_tensors(self._folder / name, self._tensors.get(name, {}), holders.group)

    def load(self) -> None:
        """Let the parts become what was read."""
        for part in self._parts:
            try:
                part.load(self._tensors[part.name], self._values[part.name])
            except Exception as error:
                message = f"{part.name} does not take what was saved of it: {error}"
                raise CheckpointError(message) from error


def parts_of(named: Mapping[str, Any], *, resize_experts: bool = False) -> list[Part]:
    """The parts by their kinds, and what a run has beyond them."""
    modules = {name: part for name, part in named.items() if isinstance(part, nn.Module)}
    names = parameter_names(modules)
    parts: list[Part] = []
    for name, part in named.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in (RANDOM_NUMBERS, RANKS):
            raise ValueError(f"{name!r} cannot name a part: take letters, digits, '_' and '-'.")
        if isinstance(part, nn.Module):
            parts.append(ResizedModule(name, part) if resize_experts else Module(name, part))
        elif isinstance(part, Optimizer):
            kind = ResizedOptimizer if resize_experts else OptimizerPart
            parts.append(kind(name, part, names))
        elif hasattr(part, "state_dict") and hasattr(part, "load_state_dict"):
            parts.append(Stateful(name, part))
        else:
            raise ValueError(
                f"{name!r} is a {type(part).__name__}, which has no state_dict and load_state_dict."
            )
    accumulated = [Accumulated(name, unwrapped(module)) for name, module in modules.items()]
    return [*parts, *accumulated, RandomNumbers()]
