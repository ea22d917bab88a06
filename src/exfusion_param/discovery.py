"""Finds the FFN groups of a model: which linears make up an FFN, in the order in which they run.

A family of models is a line of data, `FFN_LINEARS`: the class of the module that holds the FFN, and
the names of its linears. Subclasses count. What no line names, a filter can.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

Filter = Callable[[nn.Module, str], bool] | Sequence[str]

FFN_LINEARS: Mapping[str, tuple[str, ...]] = {
    "timm.layers.mlp.Mlp": ("fc1", "fc2"),
    "torch.nn.modules.transformer.TransformerEncoderLayer": ("linear1", "linear2"),
    "torch.nn.modules.transformer.TransformerDecoderLayer": ("linear1", "linear2"),
}


@dataclasses.dataclass(frozen=True)
class FFNGroup:
    """The linears of one FFN, which share fusion weights.

    Args:
        name: name in the model of the module that holds them.
        linears: each linear by its name in the model, in the order in which they run.
    """

    name: str
    linears: Mapping[str, nn.Module]


def select_groups(
    model: nn.Module, filter_fn: Filter | None, layers: Sequence[int] | None
) -> list[FFNGroup]:
    """The FFN groups to wrap, in the order of the model.

    Args:
        model: any module.
        filter_fn: asked for each linear of the model, `filter_fn(module, fqn)`, or globs for the
            names of linears. Chosen linears of a known FFN form its group; others form one group
            with the chosen linears beside them. None takes the linears of all known FFNs.
        layers: indices of the groups to take; None takes all.

    Raises:
        ValueError: nothing matched, a glob matched nothing, or an index is out of range.
    """
    linears = candidate_linears(model)
    known = _known_ffns(model, linears)
    groups = known if filter_fn is None else _group(_filtered(linears, filter_fn), known)
    if not groups:
        raise ValueError(_nothing_matched(model, linears, filter_fn))
    return groups if layers is None else _at(groups, layers)


def candidate_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear of the model by its name, wrapped ones included."""
    return {fqn: module for fqn, module in model.named_modules() if isinstance(module, nn.Linear)}


def _known_ffns(model: nn.Module, linears: Mapping[str, nn.Module]) -> list[FFNGroup]:
    groups = []
    for fqn, module in model.named_modules():
        names = [_join(fqn, name) for name in _ffn_linears(module)]
        if found := {name: linears[name] for name in names if name in linears}:
            groups.append(FFNGroup(fqn, found))
    return groups


def _ffn_linears(module: nn.Module) -> tuple[str, ...]:
    for cls in type(module).__mro__:
        if names := FFN_LINEARS.get(f"{cls.__module__}.{cls.__qualname__}"):
            return names
    return ()


def _filtered(linears: Mapping[str, nn.Module], filter_fn: Filter) -> dict[str, nn.Module]:
    if callable(filter_fn):
        return {fqn: linear for fqn, linear in linears.items() if filter_fn(linear, fqn)}
    globs = [filter_fn] if isinstance(filter_fn, str) else list(filter_fn)
    for glob in globs:
        if not any(fnmatchcase(fqn, glob) for fqn in linears):
            raise ValueError(f"The glob {glob!r} matches no linear. {_list_of(linears)}")
    chosen = {fqn for fqn in linears for glob in globs if fnmatchcase(fqn, glob)}
    return {fqn: linear for fqn, linear in linears.items() if fqn in chosen}


def _group(chosen: Mapping[str, nn.Module], known: Sequence[FFNGroup]) -> list[FFNGroup]:
    """The chosen linears by FFN, or by the module that holds them if no known FFN does."""
    ffn_of = {fqn: group for group in known for fqn in group.linears}
    groups: dict[str, dict[str, nn.Module]] = {}
    for fqn, linear in chosen.items():
        if fqn not in ffn_of:
            groups.setdefault(fqn.rpartition(".")[0], {})[fqn] = linear
        elif (ffn := ffn_of[fqn]).name not in groups:
            groups[ffn.name] = {name: chosen[name] for name in ffn.linears if name in chosen}
    return [FFNGroup(name, linears) for name, linears in groups.items()]


def _at(groups: Sequence[FFNGroup], layers: Sequence[int]) -> list[FFNGroup]:
    for index in layers:
        if not -len(groups) <= index < len(groups):
            raise ValueError(f"layers names FFN group {index}; the model has {len(groups)}.")
    indices = sorted({index % len(groups) for index in layers})
    return [groups[index] for index in indices]


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _nothing_matched(
    model: nn.Module, linears: Mapping[str, nn.Module], filter_fn: Filter | None
) -> str:
    what = "No FFN of a known kind" if filter_fn is None else "No linear that filter_fn accepts"
    return (
        f"{what} in {type(model).__name__}. {_list_of(linears)} Choose some by name, for example "
        'wrap(model, filter_fn=["*.fc1", "*.fc2"]).'
    )


def _list_of(linears: Mapping[str, nn.Module]) -> str:
    shown = [fqn or "(the model itself)" for fqn in linears][:20]
    more = f" and {len(linears) - len(shown)} more" if len(linears) > len(shown) else ""
    return f"The linears of the model are: {', '.join(shown) or 'none'}{more}."
