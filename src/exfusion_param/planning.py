"""Everything that `wrap` allocates, made before the model is touched.

A plan holds the fusion weights and the expert stacks of one group. To carry it out only moves them
into the model, which cannot fail half way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from .config import ExFusionConfig
from .discovery import FFNGroup
from .experts import independent_experts, named_generator, upcycled_experts
from .functional import accumulation_dtype
from .fusion_weights import (
    FusionWeights,
    LearnedWeights,
    StaticWeights,
    uniform_weights,
)
from .memory_bank import MemoryBank
from .parametrization import PlaceInGroup, attach, dense_tensors
from .projections import projection_of


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """Linears that are to share fusion weights, and what they get.

    Args:
        group: the linears.
        weights: their fusion weights.
        stacks: for each linear's name, the expert stack of each of its tensors.
    """

    group: FFNGroup
    weights: FusionWeights
    stacks: Mapping[str, Mapping[str, Tensor]]

    def carry_out(self) -> None:
        """Parametrize the linears with the stacks."""
        names = list(self.group.linears)
        for fqn, linear in self.group.linears.items():
            place = PlaceInGroup(
                is_first=fqn == names[0],
                reads_input=fqn in self.group.inputs,
                is_last=fqn == names[-1],
            )
            attach(linear, self.weights, self.stacks[fqn], place)


def choose_seed(config: ExFusionConfig, generator: torch.Generator | None) -> int:
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


def plan_groups(groups: Iterable[FFNGroup], config: ExFusionConfig, seed: int) -> list[GroupPlan]:
    """Draw the experts and fusion weights of all groups."""
    return [_plan(group, config, seed) for group in _routed_together(groups, config)]


def _routed_together(groups: Iterable[FFNGroup], config: ExFusionConfig) -> Iterator[FFNGroup]:
    """The groups as they share fusion weights: linear by linear with one router each."""
    for group in groups:
        if config.variant == "mb" and not config.shared_router:
            yield from (
                FFNGroup(fqn, {fqn: linear}, (fqn,)) for fqn, linear in group.linears.items()
            )
        else:
            yield group


def _plan(group: FFNGroup, config: ExFusionConfig, seed: int) -> GroupPlan:
    stacks = {
        fqn: {
            name: _experts(tensor, f"{fqn}.{name}", config, seed)
            for name, tensor in dense_tensors(linear).items()
        }
        for fqn, linear in group.linears.items()
    }
    return GroupPlan(group, _fusion_weights(group, config, seed), stacks)


def _experts(tensor: Tensor, name: str, config: ExFusionConfig, seed: int) -> Tensor:
    generator = named_generator(seed, name, tensor.device)
    if config.expert_init == "independent":
        return independent_experts(tensor, config.num_experts, generator)
    weights = uniform_weights(config.num_experts, tensor.device, accumulation_dtype(tensor.dtype))
    return upcycled_experts(tensor, weights, config.upcycle_noise, generator)


def _fusion_weights(group: FFNGroup, config: ExFusionConfig, seed: int) -> FusionWeights:
    linears = tuple(group.linears.values())
    weight, projection = linears[0].get_parameter("weight"), projection_of(linears[0])
    assert projection is not None
    device, dtype = weight.device, accumulation_dtype(weight.dtype)
    if config.variant == "sw":
        return StaticWeights(group.name, config, linears)
    if config.variant == "dw":
        return LearnedWeights(group.name, config, linears, device=device, dtype=dtype)
    return MemoryBank(
        group.name,
        config,
        linears,
        in_features=projection.in_features,
        device=device,
        dtype=dtype,
        generator=named_generator(seed, f"{group.name}.router", device),
    )
