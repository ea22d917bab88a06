"""Everything that `wrap` allocates, made before the model is touched.

A plan holds the fusion weights and the expert stacks of one group. To carry it out only moves them
into the model, which cannot fail half way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from .discovery import FFNGroup
from .drop_upcycling import Dropped, DroppedUnits
from .dtypes import accumulation_dtype
from .expert_config import ExpertConfig
from .experts import (
    drop_upcycled_experts,
    independent_experts,
    named_generator,
    upcycled_experts,
)
from .fusion_weights import FusionWeights, uniform_weights
from .linear_class import PlaceInGroup
from .parametrization import attach, dense_tensors

Config = TypeVar("Config", bound=ExpertConfig)
MakeWeights = Callable[[FFNGroup, Config, int], FusionWeights]
"""Makes the fusion weights of linears that share them, of a config, with a seed."""


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
        for index, (fqn, linear) in enumerate(self.group.linears.items()):
            place = PlaceInGroup(
                index=index,
                is_first=index == 0,
                reads_input=fqn in self.group.inputs,
                is_last=index == len(self.group.linears) - 1,
            )
            attach(linear, self.weights, self.stacks[fqn], place)
        self.weights.settle()


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

    Args:
        groups: those to wrap.
        config: the settings.
        seed: of all draws.
        make_weights: makes the fusion weights for linears that share them.

    Raises:
        ValueError: drop-upcycling is asked for in a group that is not a whole FFN.
    """
    plans = []
    for group in groups:
        stacks = _stacks(group, config, seed)
        for part in _routed_together(group, config):
            weights = make_weights(part, config, seed)
            plans.append(GroupPlan(part, weights, {fqn: stacks[fqn] for fqn in part.linears}))
    return plans


def _routed_together(group: FFNGroup, config: ExpertConfig) -> Iterator[FFNGroup]:
    """The group as its linears share fusion weights: one by one if each has its own."""
    if config.shares_fusion_weights:
        yield group
    else:
        for fqn, linear in group.linears.items():
            yield FFNGroup(fqn, {fqn: linear}, (fqn,))


def _stacks(group: FFNGroup, config: ExpertConfig, seed: int) -> dict[str, dict[str, Tensor]]:
    dropped = None
    if config.expert_init == "drop_upcycle":
        generator = named_generator(seed, f"{group.name}.units", torch.device("cpu"))
        dropped = DroppedUnits(group, config.num_experts, config.drop_ratio, generator)
    return {
        fqn: {
            name: _experts(
                tensor,
                config,
                named_generator(seed, f"{fqn}.{name}", tensor.device),
                dropped.of(fqn, name) if dropped else None,
            )
            for name, tensor in dense_tensors(linear).items()
        }
        for fqn, linear in group.linears.items()
    }


def _experts(
    tensor: Tensor,
    config: ExpertConfig,
    generator: torch.Generator | None,
    dropped: Dropped | None,
) -> Tensor:
    if config.expert_init == "independent":
        return independent_experts(tensor, config.num_experts, generator)
    if dropped is not None:
        return drop_upcycled_experts(tensor, *dropped, generator)
    # Drop-upcycling leaves exact copies of what belongs to no hidden unit.
    noise = config.upcycle_noise if config.expert_init == "upcycle" else 0.0
    weights = uniform_weights(config.num_experts, tensor.device, accumulation_dtype(tensor.dtype))
    return upcycled_experts(tensor, weights, noise, generator)
