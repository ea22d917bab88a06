"""Parameter groups for any torch optimizer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from .fusion_weights.base import FusionWeights
from .fusion_weights.variants import LearnedWeights

_STACK = re.compile(r"(^|\.)parametrizations\.(\w+)\.original$")


def param_groups(
    model: nn.Module,
    weight_decay: float | None = None,
    *,
    no_weight_decay: Collection[str] = (),
    fusion_lr: float | None = None,
    groups: Iterable[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Make parameter groups without weight decay on biases, norms and learned fusion weights.

    With `groups`, your own groups are kept, and only the expert stacks and fusion weights that
    should not decay are moved out of them:

        groups = timm.optim.param_groups_layer_decay(model, 0.05)  # with lr_scale
        optimizer = torch.optim.AdamW(exf.param_groups(model, groups=groups))

    Args:
        model: a wrapped or a dense model.
        weight_decay: the weight decay of all other parameters.
        no_weight_decay: globs for the names of further parameters without decay. A stack also
            matches by its dense name, such as "blocks.0.mlp.fc1.weight".
        fusion_lr: learning rate of learned fusion weights and routers; None uses the optimizer's.
        groups: your own groups, instead of `weight_decay`; for example `optimizer.param_groups` of
            an optimizer that has not stepped. Stacked biases, learned fusion weights and stacks
            that `model.no_weight_decay()` names are moved from groups with decay to an additional
            group without decay, which has the same other keys.

    Returns:
        The group with decay, which comes first because some schedules of weight decay expect it,
        and the group without. If `fusion_lr` is given, fusion weights and routers form up to two
        more groups. Only trainable parameters are included, and no group is empty. With `groups`:
        your groups, and then those with the parameters that were moved.

    Raises:
        TypeError: both or neither of `weight_decay` and `groups` are given, or the groups are not
            dicts that have "params".
        ValueError: `weight_decay` or `fusion_lr` is negative, or a glob matches no parameter.

    Examples:
        >>> model = exf.wrap(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), variant="dw")
        >>> groups = exf.param_groups(model, weight_decay=0.05, fusion_lr=1e-2)
        >>> [(len(group["params"]), group["weight_decay"], group.get("lr")) for group in groups]
        [(4, 0.05, None), (8, 0.0, None), (1, 0.0, 0.01)]
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    """
    if (weight_decay is None) == (groups is None):
        got = "neither" if groups is None else "both"
        raise TypeError(
            f"param_groups needs either weight_decay or groups that have their own, got {got}."
        )
    for name, value in (("weight_decay", weight_decay), ("fusion_lr", fusion_lr)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}.")
    names = no_weight_decay_names(model, no_weight_decay)
    if groups is not None:
        groups = list(groups)
        _refuse_other_groups(groups)
        names &= _unknown_to_rules(model) | _matched(model, no_weight_decay)
    else:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [{"params": trained, "weight_decay": weight_decay}]
    exempt = {id(p) for name, p in model.named_parameters() if name in names}
    fusion = set() if fusion_lr is None else _fusion_parameters(model)
    return _split([dict(group) for group in groups], exempt, fusion, fusion_lr)


def _refuse_other_groups(groups: Sequence[Any]) -> None:
    for group in groups:
        if not (isinstance(group, Mapping) and "params" in group):
            raise TypeError(
                "groups must be dicts that have 'params', as optimizers take them, got "
                f'{type(group).__name__}. For one group pass [{{"params": parameters}}].'
            )


def _split(
    groups: Iterable[dict[str, Any]], exempt: set[int], fusion: set[int], fusion_lr: float | None
) -> list[dict[str, Any]]:
    """Groups by what decays and what has a learning rate of its own; all other keys are kept."""
    given = [(group, _entries(group), bool(group.get("weight_decay", True))) for group in groups]
    result = []
    for is_fusion in (False, True):
        for is_exempt in (False, True):
            settings: dict[str, Any] = {"weight_decay": 0.0} if is_exempt else {}
            settings |= {"lr": fusion_lr} if is_fusion else {}
            for group, entries, decays in given:
                chosen = [
                    index
                    for index, tensor in enumerate(map(_tensor_of, entries))
                    if (id(tensor) in fusion) == is_fusion
                    and (decays and id(tensor) in exempt) == is_exempt
                ]
                lists = {"params": entries, "param_names": group.get("param_names", [])}
                parts = {k: [v[i] for i in chosen] for k, v in lists.items() if k in group}
                result.append(group | parts | settings)
    return [group for group in result if group["params"]]


def _entries(group: Mapping[str, Any]) -> list[Any]:
    params = group["params"]
    return [params] if isinstance(params, Tensor) else list(params)


def _tensor_of(entry: Any) -> Tensor:
    """A parameter that may come with its name."""
    return entry[1] if isinstance(entry, tuple) else entry


def _matched(model: nn.Module, globs: Collection[str]) -> set[str]:
    globs = [globs] if isinstance(globs, str) else globs
    names = (name for name, _ in model.named_parameters())
    return {name for name in names if any(_matches(name, glob) for glob in globs)}


def _unknown_to_rules(model: nn.Module) -> set[str]:
    """Names of what a rule for dense models misjudges: expert stacks and learned fusion weights."""
    learned = learned_fusion_weights(model)
    return {
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in learned or _STACK.search(name)
    }


def no_weight_decay_names(model: nn.Module, also: Collection[str] = ()) -> set[str]:
    """List the parameters without weight decay, for functions that group parameters by name.

        timm.optim.param_groups_layer_decay(
            model, 0.05, no_weight_decay_list=exf.no_weight_decay_names(model)
        )

    As in timm's `param_groups_weight_decay`, these are biases, all tensors with fewer than two
    dimensions, and the names that `model.no_weight_decay()` returns. Stacked biases, which have two
    dimensions, and learned fusion weights are added. Routers decay like any weight.

    Args:
        model: a wrapped or a dense model.
        also: globs for the names of further parameters; a stack also matches by its dense name.

    Raises:
        ValueError: a glob matches no parameter.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        >>> model = exf.wrap(model, fuse_on="step")
        >>> sorted(exf.no_weight_decay_names(model))
        ['0.bias', '2.bias']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    also = [also] if isinstance(also, str) else list(also)
    _refuse_unmatched(model, also)
    globs = [*also, *_declared_by(model)]
    learned = learned_fusion_weights(model)
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim <= 1
        or name.endswith((".bias", "parametrizations.bias.original"))
        or id(parameter) in learned
        or any(_matches(name, glob) for glob in globs)
    }


def _matches(name: str, glob: str) -> bool:
    dense_name = _STACK.sub(r"\1\2", name)
    return fnmatchcase(name, glob) or fnmatchcase(dense_name, glob)


def _refuse_unmatched(model: nn.Module, globs: Iterable[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    for glob in globs:
        if not any(_matches(name, glob) for name in names):
            raise ValueError(f"The glob {glob!r} in no_weight_decay matches no parameter.")


def _declared_by(model: nn.Module) -> Collection[str]:
    declare = getattr(model, "no_weight_decay", None)
    return declare() if callable(declare) else ()


def learned_fusion_weights(model: nn.Module) -> set[int]:
    """The ids of the parameters that are learned fusion weights (`dw`)."""
    modules = (module for module in model.modules() if isinstance(module, LearnedWeights))
    return {id(module.weights) for module in modules}


def _fusion_parameters(model: nn.Module) -> set[int]:
    modules = (module for module in model.modules() if isinstance(module, FusionWeights))
    return {id(parameter) for module in modules for parameter in module.parameters()}
