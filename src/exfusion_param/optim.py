"""Parameter groups for any torch optimizer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .fusion_weights import LearnedWeights
from .parametrization import fused_names, original, wrapped_linears


def param_groups(
    model: nn.Module, weight_decay: float, *, no_weight_decay: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Parameter groups without weight decay on biases, norms and fusion weights.

    As timm's `param_groups_weight_decay`, it decays every tensor of two dimensions or more that is
    not a bias. A stacked bias has two dimensions and a name of its own, so rules on either miss it.
    The router decays like any weight matrix.

    Args:
        model: a wrapped or a dense model.
        weight_decay: of the weights.
        no_weight_decay: globs for the names of more parameters that are not to decay; a stack has
            its dense name too, such as "blocks.0.mlp.fc1.weight". Those that
            `model.no_weight_decay()` lists, as timm's models do, never decay.

    Returns:
        The group without decay and the one with it, in this order; trainable parameters alone, and
        no group that is empty.

    Raises:
        ValueError: `weight_decay` is negative, or a glob matches no parameter.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay}.")
    asked = [no_weight_decay] if isinstance(no_weight_decay, str) else list(no_weight_decay)
    _refuse_unmatched(model, asked)
    skipped = [*asked, *_declared_by(model)]
    exempt = _stacked_biases(model) | _learned_fusion_weights(model)
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_vector = parameter.ndim <= 1 or name.endswith(".bias")
        is_skipped = any(_matches(name, glob) for glob in skipped)
        is_exempt = is_vector or is_skipped or id(parameter) in exempt
        (no_decay if is_exempt else decay).append(parameter)
    groups: tuple[dict[str, Any], ...] = (
        {"params": no_decay, "weight_decay": 0.0},
        {"params": decay, "weight_decay": weight_decay},
    )
    return [group for group in groups if group["params"]]


def _matches(name: str, glob: str) -> bool:
    dense_name = re.sub(r"(^|\.)parametrizations\.(\w+)\.original$", r"\1\2", name)
    return fnmatchcase(name, glob) or fnmatchcase(dense_name, glob)


def _refuse_unmatched(model: nn.Module, globs: Iterable[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    for glob in globs:
        if not any(_matches(name, glob) for name in names):
            raise ValueError(f"The glob {glob!r} in no_weight_decay matches no parameter.")


def _declared_by(model: nn.Module) -> Collection[str]:
    declare = getattr(model, "no_weight_decay", None)
    return declare() if callable(declare) else ()


def _stacked_biases(model: nn.Module) -> set[int]:
    return {
        id(original(linear, "bias"))
        for linear in wrapped_linears(model).values()
        if "bias" in fused_names(linear)
    }


def _learned_fusion_weights(model: nn.Module) -> set[int]:
    modules = (module for module in model.modules() if isinstance(module, LearnedWeights))
    return {id(module.weights) for module in modules}
