"""Which FFN groups to wrap: those that are found, or those that a filter chooses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from .discovery import FFNGroup, candidate_linears, ffns_in_module, find_ffns
from .mixtures import refuse_mixtures
from .outer_modules import listed

Filter = Callable[[nn.Module, str], bool] | Sequence[str]
NamedLinears = Mapping[str, nn.Module]


def select_groups(
    model: nn.Module, filter_fn: Filter | None, layers: Sequence[int] | None
) -> list[FFNGroup]:
    """The FFN groups to wrap, in the order of the model.

    Args:
        model: any module.
        filter_fn: asked for each linear of the model, `filter_fn(module, fqn)`, or globs for the
            names of linears. Chosen linears of an FFN form its group; others form one group with
            the chosen linears beside them. None takes the linears of all FFNs that are found.
        layers: indices of the groups to take; None takes all.

    Raises:
        ValueError: nothing matched, a glob matched nothing, an index is out of range, a linear has
            no shape yet, or the model is a mixture of experts and no filter chooses among its
            linears.
    """
    if not (filter_fn is None or callable(filter_fn) or isinstance(filter_fn, Iterable)):
        raise TypeError(f"filter_fn must be a function or globs, got {filter_fn!r}.")
    linears = candidate_linears(model)
    _refuse_lazy(linears)
    groups = find_ffns(model)
    if filter_fn is None:
        refuse_mixtures(model, groups)
        _refuse_shared(model, groups)
    else:
        groups = _group(_filtered(linears, filter_fn), groups)
    if not groups:
        raise ValueError(_nothing_matched(model, linears, filter_fn))
    return groups if layers is None else _at(groups, layers)


def _refuse_lazy(linears: NamedLinears) -> None:
    for fqn, linear in linears.items():
        if any(map(nn.parameter.is_lazy, linear.parameters(recurse=False))):
            raise ValueError(f"{fqn} is lazy, without a shape yet. Run a forward before wrap().")


def _refuse_shared(model: nn.Module, groups: Iterable[FFNGroup]) -> None:
    """Raise if two FFNs have some of their linears in common; they may have all."""
    own = {linear: (fqn, group) for group in groups for fqn, linear in group.linears.items()}
    for fqn, module in model.named_modules(remove_duplicate=False):
        name, group = own.get(module, (fqn, None))
        if name == fqn or group is None:
            continue
        holder = model.get_submodule(fqn.rpartition(".")[0])
        found = next((ffn for ffn in ffns_in_module(holder) if module in ffn), None)
        if found and set(found) != set(group.linears.values()):
            raise ValueError(
                f"{fqn} is the same module as {name}, and the two FFNs would share one of their "
                "linears, but not the experts' fusion weights. Give each its own, or choose the "
                "linears of one FFN with filter_fn."
            )


def _filtered(linears: NamedLinears, filter_fn: Filter) -> dict[str, nn.Module]:
    if callable(filter_fn):
        return {fqn: linear for fqn, linear in linears.items() if filter_fn(linear, fqn)}
    globs = [filter_fn] if isinstance(filter_fn, str) else list(filter_fn)
    for glob in globs:
        if not any(fnmatchcase(fqn, glob) for fqn in linears):
            raise ValueError(f"The glob {glob!r} matches no linear. {_list_of(linears)}")
    chosen = {fqn for fqn in linears for glob in globs if fnmatchcase(fqn, glob)}
    return {fqn: linear for fqn, linear in linears.items() if fqn in chosen}


def _group(chosen: NamedLinears, ffns: Sequence[FFNGroup]) -> list[FFNGroup]:
    """The chosen linears by FFN, or by the module that holds them if no FFN does."""
    ffn_of = {fqn: ffn for ffn in ffns for fqn in ffn.linears}
    groups: dict[str, FFNGroup] = {}
    for fqn in chosen:
        ffn = ffn_of.get(fqn)
        name = ffn.name if ffn else fqn.rpartition(".")[0]
        if name not in groups:
            beside = [other for other in chosen if other.rpartition(".")[0] == name]
            names = [n for n in ffn.linears if n in chosen] if ffn else beside
            inputs = [n for n in ffn.inputs if n in chosen] if ffn else []
            linears = {n: chosen[n] for n in names}
            groups[name] = FFNGroup(name, linears, tuple(inputs or names[:1]))
    return list(groups.values())


def _at(groups: Sequence[FFNGroup], layers: Sequence[int]) -> list[FFNGroup]:
    for index in layers:
        if not -len(groups) <= index < len(groups):
            raise ValueError(f"layers names FFN group {index}; the model has {len(groups)}.")
    indices = sorted({index % len(groups) for index in layers})
    return [groups[index] for index in indices]


def _nothing_matched(model: nn.Module, linears: NamedLinears, filter_fn: Filter | None) -> str:
    what = "No FFN was found" if filter_fn is None else "filter_fn accepts no linear"
    return f"{what} in {type(model).__name__}. {_list_of(linears)}"


def _list_of(linears: NamedLinears) -> str:
    if not linears:
        return "The model has no linears."
    globs = list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", fqn) for fqn in linears))
    return f"Its linears are: {listed(linears, 20)}. All of them: wrap(model, filter_fn={globs})."
