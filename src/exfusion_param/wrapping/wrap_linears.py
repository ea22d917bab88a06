"""How linears of a model get their expert stacks, whatever makes the fusion weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..finding.left_out import warn_of_left_out
from ..finding.selection import Filter, select_groups
from ..fusion_weights.base import FusionWeights, on_creation
from ..fusion_weights.token_pool import TokenPool
from ..step.hooks import install
from ..tensors.ranks import ranks_in
from .checks import check_wrappable
from .load_guard import guard_loading
from .padding_masks import follow_padding_masks
from .planning import Config, MakeWeights, choose_seed, plan_groups

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

on_creation(install)  # importing the package registers nothing with torch


def wrap_linears(
    model: nn.Module,
    config: Config,
    make_weights: MakeWeights[Config],
    *,
    filter_fn: Filter | None,
    generator: torch.Generator | None,
    process_group: ProcessGroup | DeviceMesh | None,
) -> list[FusionWeights]:
    """Parametrize linears of a model with expert stacks, in place; arguments as for `wrap`.

    Returns:
        The new fusion weights, in the order of the model.

    Raises:
        TypeError: `model` is not a module.
        ValueError: as for `wrap`. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if torch.is_inference_mode_enabled():
        raise ValueError("wrap() creates trainable parameters. Call it outside of inference_mode.")
    groups = select_groups(model, filter_fn, config.layers)
    check_wrappable(model, groups, config)
    ranks = None if process_group is None else ranks_in(process_group)
    seed = choose_seed(config, generator)
    plans = plan_groups(groups, config, seed, make_weights)  # allocates everything
    for plan in plans:
        plan.fusion_weights.given_ranks = ranks
        plan.carry_out(model)
        guard_loading(model, plan.fusion_weights, plan.group.linears)
    new = [plan.fusion_weights for plan in plans]
    follow_padding_masks(model, [each for each in new if isinstance(each, TokenPool)])
    if filter_fn is None and config.layers is None:
        warn_of_left_out(model, {linear for group in groups for linear in group.linears.values()})
    return new
