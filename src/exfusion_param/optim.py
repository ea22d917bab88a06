"""Parameter groups for any torch optimizer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .fusion_weights.base import FusionWeights
from .fusion_weights.variants import LearnedWeights


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    no_weight_decay: Collection[str] = (),
    fusion_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups without weight decay on biases, norms and learned fusion weights.

    Args:
        model: a wrapped or a dense model.
        weight_decay: of the weights.
        no_weight_decay: globs for the names of more parameters that are not to decay; a stack has
            its dense name too, such as "blocks.0.mlp.fc1.weight".
        fusion_lr: learning rate of learned fusion weights and routers; None takes the optimizer's.

    Returns:
        A group without decay and one with it, and two more of the fusion weights and routers if
        they have a learning rate of their own; trainable parameters alone, and no empty group.

    Raises:
        ValueError: `weight_decay` or `fusion_lr` is negative, or a glob matches no parameter.
    """
    for name, value in (("weight_decay", weight_decay), ("fusion_lr", fusion_lr)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}.")
    without_decay = no_weight_decay_names(model, no_weight_decay)
    fusion = set() if fusion_lr is None else _fusion_parameters(model)
    groups: list[dict[str, Any]] = []
    for is_fusion in (False, True):
        for decays in (False, True):
            params = [
                parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
                and (id(parameter) in fusion) == is_fusion
                and (name not in without_decay) == decays
            ]
            group = {"params": params, "weight_decay": weight_decay if decays else 0.0}
            groups.append(group | ({"lr": fusion_lr} if is_fusion else {}))
    return [group for group in groups if group["params"]]


def no_weight_decay_names(model: nn.Module, also: Collection[str] = ()) -> set[str]:
    """Names of the parameters without weight decay, for functions that make groups by names.

        timm.optim.param_groups_layer_decay(
            model, 0.05, no_weight_decay_list=exf.no_weight_decay_names(model)
        )

    As in timm's `param_groups_weight_decay`, they are biases, all tensors of less than two
    dimensions, and what `model.no_weight_decay()` lists; and besides stacked biases, which have two
    dimensions and a name of their own, and learned fusion weights. Routers decay like any weight.

    Args:
        model: a wrapped or a dense model.
        also: globs for the names of more parameters; a stack has its dense name too.

    Raises:
        ValueError: a glob matches no parameter.
    """
    also = [also] if isinstance(also, str) else list(also)
    _refuse_unmatched(model, also)
    globs = [*also, *_declared_by(model)]
    exempt = _stacked_biases(model) | learned_fusion_weights(model)
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim <= 1
        or name.endswith(".bias")
        or id(parameter) in exempt
        or any(_matches(name, glob) for glob in globs)
    }


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
        id(stack)
        for name, stack in model.named_parameters()
        if name.endswith("parametrizations.bias.original")
    }


def learned_fusion_weights(model: nn.Module) -> set[int]:
    """The ids of the parameters that are learned fusion weights (`dw`)."""
    modules = (module for module in model.modules() if isinstance(module, LearnedWeights))
    return {id(module.weights) for module in modules}


def _fusion_parameters(model: nn.Module) -> set[int]:
    modules = (module for module in model.modules() if isinstance(module, FusionWeights))
    return {id(parameter) for module in modules for parameter in module.parameters()}
