"""`wrap` and `fuse`: a dense model to expert stacks, in place, and back."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from .checkpoint_reader import ENTRY
from .config import ExFusionConfig
from .ddp import leave_out_of_ddp
from .discovery import Filter, select_groups
from .fusion_weights import warn_of_empty_banks
from .load_guard import guard_loading
from .memory_bank import MemoryBank
from .parametrization import detach, groups_of, wrapped_linears
from .planning import choose_seed, plan_groups
from .validation import check_fusable, check_wrappable

Model = TypeVar("Model", bound=nn.Module)


def wrap(
    model: Model,
    config: ExFusionConfig | None = None,
    *,
    filter_fn: Filter | None = None,
    generator: torch.Generator | None = None,
    **fields: Any,
) -> Model:
    """Turn the FFN linears of a model into weighted sums of experts, in place.

    Make the optimizer after this call: `param_groups(model, weight_decay)` or `model.parameters()`.

    Args:
        model: any module. Its classes, code and other parameters stay as they are.
        config: the settings; None takes the paper's.
        filter_fn: which linears to wrap instead of those of the FFNs that are known:
            `filter_fn(module, fqn) -> bool`, asked for every linear, or globs for their names.
        generator: draws the seed of the experts and routers, instead of `config.seed`.
        **fields: fields of the config, `wrap(model, num_experts=8, variant="dw")`.

    Returns:
        `model`, the same object.

    Raises:
        TypeError: a field is unknown or has the wrong type.
        ValueError: a field is out of range, nothing matched, or a linear cannot be wrapped (tied,
            frozen, sharded, wrapped already, not floating). The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if torch.is_inference_mode_enabled():
        raise ValueError("wrap() makes parameters to train. Call it outside of inference_mode.")
    config = resolve_config(config, fields)
    groups = select_groups(model, filter_fn, config.layers)
    check_wrappable(model, groups, config)
    follow_masks = _mask_follower(config)
    plans = plan_groups(groups, config, choose_seed(config, generator))  # allocates everything
    for plan in plans:
        plan.carry_out()
        guard_loading(model, plan.weights, plan.group.linears)
    follow_masks(model, [plan.weights for plan in plans if isinstance(plan.weights, MemoryBank)])
    leave_out_of_ddp(model)
    _warn_of_bank(config)
    return model


def fuse(model: Model) -> Model:
    """Give the dense model back, in place: every expert stack becomes its fused weight.

    Classes, parameter names, their order and dtypes are those from before `wrap`; no hook and no
    buffer is left. Fuse a `copy.deepcopy(model)` to ship a model that trains on.

    Args:
        model: a wrapped model, or a module that holds whole FFN groups of one.

    Returns:
        `model`, the same object.

    Raises:
        ValueError: nothing is wrapped, a linear is sharded, or experts hold NaN or inf. The model
            is then unchanged.
    """
    linears = wrapped_linears(model)
    groups = groups_of(model)
    for weights in groups:
        weights.release()
    check_fusable(model, linears)
    warn_of_empty_banks(groups)
    for weights in groups:
        weights.retire()
    for linear in linears.values():
        detach(linear)
    config = getattr(model, "config", None)
    leave_out_of_ddp(model)
    if isinstance(getattr(config, ENTRY, None), dict):  # read back from a config.json
        delattr(config, ENTRY)
    return model


def resolve_config(config: ExFusionConfig | None, fields: dict[str, Any]) -> ExFusionConfig:
    """The config with some fields replaced; the default one if it is None."""
    if config is not None and not isinstance(config, ExFusionConfig):
        raise TypeError(f"config must be an ExFusionConfig or None, got {type(config).__name__}.")
    return (config or ExFusionConfig()).replace(**fields)


def _mask_follower(config: ExFusionConfig) -> Callable[[nn.Module, list[MemoryBank]], None]:
    """What lets memory banks follow attention masks; imports transformers only for its models."""
    if config.variant == "mb" and "transformers" in sys.modules:
        from .integrations.attention_masks import follow_attention_masks

        return follow_attention_masks
    return lambda model, banks: None


def _warn_of_bank(config: ExFusionConfig) -> None:
    if config.variant != "mb":
        return
    if config.expert_init != "independent" and config.bank_init == "zeros":
        warnings.warn(
            "Upcycled experts under a memory bank of zeros: the model forgets what it was "
            'pretrained for while the bank fills. Use bank_init="uniform".',
            stacklevel=3,
        )
