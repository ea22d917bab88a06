"""Everything that `wrap` allocates, made before the model is touched.

A plan holds the fusion weights of one group, and what its linears get: expert stacks, or under
`fuse_on="step"` new values and how their experts are drawn. To carry it out only moves these into
the model, which cannot fail half way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..expert_config import ExpertConfig
from ..finding.discovery import FFNGroup
from ..finding.place import PlaceInGroup
from ..finding.projections import projections_of
from ..fusion_weights.base import FusionWeights
from ..step.attach import attach_fused
from ..tensors.expert_starts import ExpertStart, named_generator
from ..tensors.sliced_sums import fuse_into
from .attach import attach, dense_tensors
from .drop_upcycling import DroppedUnits

Config = TypeVar("Config", bound=ExpertConfig)
MakeWeights = Callable[[FFNGroup, Config, int], FusionWeights]
"""Makes the fusion weights of linears that share them, of a config, with a seed."""


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """Linears that are to share fusion weights, and what they get.

    Args:
        group: the linears.
        fusion_weights: theirs.
        starts: for each linear's name, how the experts of each of its tensors are drawn.
        tensors: for each linear's name and tensor the expert stack, shape (N, *S); under
            `fuse_on="step"` the new value, shape (*S), or None where it stays.
    """

    group: FFNGroup
    fusion_weights: FusionWeights
    starts: Mapping[str, Mapping[str, ExpertStart]]
    tensors: Mapping[str, Mapping[str, Tensor | None]]

    def carry_out(self, model: nn.Module) -> None:
        """Give the linears what is planned."""
        if self.fusion_weights.config.fuse_on == "step":
            attach_fused(model, self.group, self.fusion_weights, self.starts, self.tensors)
            return
        for index, (fqn, linear) in enumerate(self.group.linears.items()):
            place = PlaceInGroup(
                projections_of([linear])[0],
                index=index,
                is_first=index == 0,
                reads_input=fqn in self.group.inputs,
                is_last=index == len(self.group.linears) - 1,
            )
            stacks = {k: stack for k, stack in self.tensors[fqn].items() if stack is not None}
            attach(linear, self.fusion_weights, stacks, place)


def choose_seed(config: ExpertConfig, generator: torch.Generator | None) -> int:
    """The seed of all draws of one `wrap`: the config's, or one drawn by the generator.

    Raises:
        ValueError: both are given.
    """
    if config.seed is None:
        device = "cpu" if generator is None else generator.device
        return int(torch.randint(2**31, (), generator=generator, device=device))
    if generator is not None:
        raise ValueError("seed and generator are both given. Give one of them.")
    return config.seed


def plan_groups(
    groups: Iterable[FFNGroup], config: Config, seed: int, make_weights: MakeWeights[Config]
) -> list[GroupPlan]:
    """Draw the experts and fusion weights of all groups.

    Raises:
        ValueError: drop-upcycling is asked for in a group that is not a whole FFN.
    """
    plans = []
    for group in groups:
        starts = _starts(group, config, seed)
        for part in _routed_together(group, config):
            fusion_weights = make_weights(part, config, seed)
            tensors = {
                fqn: {
                    name: _planned(tensor, starts[fqn][name], fusion_weights)
                    for name, tensor in dense_tensors(linear).items()
                }
                for fqn, linear in part.linears.items()
            }
            plans.append(GroupPlan(part, fusion_weights, starts, tensors))
    return plans


def _routed_together(group: FFNGroup, config: ExpertConfig) -> Iterator[FFNGroup]:
    """The group as its linears share fusion weights: one by one if each has its own."""
    if config.shares_fusion_weights:
        yield group
    else:
        for fqn, linear in group.linears.items():
            yield FFNGroup(fqn, {fqn: linear}, (fqn,))


def _starts(group: FFNGroup, config: ExpertConfig, seed: int) -> dict[str, dict[str, ExpertStart]]:
    dropped = None
    if config.expert_init == "drop_upcycle":
        generator = named_generator(seed, f"{group.name}.units", torch.device("cpu"))
        dropped = DroppedUnits(group, config.num_experts, config.drop_ratio, generator)
    return {
        fqn: {
            name: ExpertStart(
                config, seed, f"{fqn}.{name}", dropped.of(fqn, name) if dropped else None
            )
            for name in dense_tensors(linear)
        }
        for fqn, linear in group.linears.items()
    }


@torch.no_grad()
def _planned(tensor: Tensor, start: ExpertStart, group: FusionWeights) -> Tensor | None:
    """The stack of a tensor; under `fuse_on="step"` what it fuses to, or None if that is known."""
    config = group.config
    if config.fuse_on == "forward":
        return start.draw(tensor)
    if tensor.is_meta or (config.expert_init == "upcycle" and not group.is_empty()):
        return None
    fused = torch.empty_like(tensor)
    fuse_into(fused, start.draw(tensor), group.current_weights())
    return fused
