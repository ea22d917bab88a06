"""Finds the FFN groups of a model: which linears make up an FFN, in the order in which they run.

First by name (ffn_shapes.py). Where no name fits, by structure: a module with just two linears, D
to H and H back to D with H > D, or with two of D to H for a gated FFN. What neither finds, a filter
can name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from .ffn_shapes import ATTENTION, FFN_SHAPES, MIXTURES, FFNShape
from .outer_modules import listed
from .projections import CONVOLUTIONS, Projection, projection_of

Filter = Callable[[nn.Module, str], bool] | Sequence[str]
NamedLinears = Mapping[str, nn.Module]


@dataclasses.dataclass(frozen=True)
class FFNGroup:
    """The linears of one FFN, which share fusion weights.

    Args:
        name: name in the model of the module that holds them.
        linears: each linear by its name in the model, in the order in which they run.
        inputs: names of those that read the FFN's input, the first linear among them.
    """

    name: str
    linears: NamedLinears
    inputs: tuple[str, ...]


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
    if filter_fn is None:
        _refuse_mixtures(model)
    groups = find_ffns(model)
    if filter_fn is None:
        _refuse_shared(model, groups)
    if filter_fn is not None:
        groups = _group(_filtered(linears, filter_fn), groups)
    if not groups:
        raise ValueError(_nothing_matched(model, linears, filter_fn))
    return groups if layers is None else _at(groups, layers)


def candidate_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every projection of the model by its name, wrapped ones included."""
    return {fqn: module for fqn, module in model.named_modules() if projection_of(module)}


def find_ffns(model: nn.Module) -> list[FFNGroup]:
    """All FFNs of the model, in its order; each linear in one, held by the smallest module."""
    modules = dict(model.named_modules())
    groups: list[FFNGroup] = []
    taken: set[nn.Module] = set()
    for fqn, module in reversed(modules.items()):  # what is inside of a module comes before it
        if _is_attention(fqn, module):
            continue
        found = _by_name(module) or _by_structure(module)
        linears = {_join(fqn, name): linear for name, linear in found.items()}
        # A linear that several modules hold belongs to the first, by whose name it is known.
        if linears and linears.keys() <= modules.keys() and taken.isdisjoint(found.values()):
            taken.update(found.values())
            groups.append(FFNGroup(fqn, linears, tuple(linears)[:-1]))
    rank = {fqn: index for index, fqn in enumerate(modules)}
    return sorted(groups, key=lambda group: rank[group.inputs[0]])


def _by_name(module: nn.Module) -> dict[str, nn.Module]:
    for shape in FFN_SHAPES:
        if shape.holder.search(_class_name(module)) and (found := _fitting(module, shape)):
            return found
    return {}


def _fitting(module: nn.Module, shape: FFNShape) -> dict[str, nn.Module]:
    names = (*shape.inputs, shape.output)
    linears = {name: _descendant(module, name) for name in names}
    maps = [projection_of(linear) if linear is not None else None for linear in linears.values()]
    if not all(maps) or not _is_ffn([p for p in maps if p is not None]):
        return {}
    return {name: linear for name, linear in linears.items() if linear is not None}


def _by_structure(module: nn.Module) -> dict[str, nn.Module]:
    """Two or three linears, directly in the module or anywhere below it, that make up an FFN."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):  # what these hold need not run in turn
        return {}
    children = {name: child for name, child in module.named_children() if _is_linear(child)}
    below = {name: child for name, child in module.named_modules() if _is_linear(child)}
    for linears in (children, below):
        if len(linears) not in (2, 3) or any(ATTENTION.search(name) for name in linears):
            continue
        maps = [p for p in map(projection_of, linears.values()) if p is not None]
        # With H < D it may be an adapter, or squeeze-and-excitation.
        if _is_ffn(maps) and maps[0].out_features > maps[0].in_features:
            return linears
    return {}


def _is_ffn(maps: Sequence[Projection]) -> bool:
    """Whether all but the last map D to H and the last maps H, or one half of it, back to D."""
    *first, last = maps
    widths = {(p.in_features, p.out_features) for p in first}
    if len(widths) != 1:
        return False
    ((features, hidden),) = widths
    return last.in_features in (hidden, hidden / 2) and last.out_features == features


def _is_linear(module: nn.Module) -> bool:
    """Whether a module can be part of an FFN by its structure: convolutions need a name."""
    projection = projection_of(module)
    return projection is not None and not isinstance(module, CONVOLUTIONS)


def _is_attention(fqn: str, module: nn.Module) -> bool:
    return bool(ATTENTION.search(fqn.rpartition(".")[2]) or ATTENTION.search(_class_name(module)))


def _class_name(module: nn.Module) -> str:
    return type(module).__name__


def _descendant(module: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        child = dict(module.named_children()).get(part)
        if child is None:
            return None
        module = child
    return module


def _refuse_lazy(linears: NamedLinears) -> None:
    for fqn, linear in linears.items():
        if any(map(nn.parameter.is_lazy, linear.parameters(recurse=False))):
            raise ValueError(f"{fqn} is lazy, without a shape yet. Run a forward before wrap().")


def _refuse_mixtures(model: nn.Module) -> None:
    for fqn, module in model.named_modules():
        if MIXTURES.search(_class_name(module)):
            raise ValueError(
                f"{type(model).__name__} is a mixture of experts already: {fqn or 'the model'} is "
                f"a {_class_name(module)}. Choose among its dense linears with filter_fn."
            )


def _refuse_shared(model: nn.Module, groups: Iterable[FFNGroup]) -> None:
    """Raise if two FFNs have some of their linears in common; they may have all."""
    place_of = {linear: (fqn, group) for group in groups for fqn, linear in group.linears.items()}
    for fqn, module in model.named_modules(remove_duplicate=False):
        name, group = place_of.get(module, (fqn, None))
        if name == fqn or group is None:
            continue
        parent = model.get_submodule(fqn.rpartition(".")[0])
        found = set((_by_name(parent) or _by_structure(parent)).values())
        if module in found and found != set(group.linears.values()):
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


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _nothing_matched(model: nn.Module, linears: NamedLinears, filter_fn: Filter | None) -> str:
    what = "No FFN was found" if filter_fn is None else "filter_fn accepts no linear"
    return f"{what} in {type(model).__name__}. {_list_of(linears)}"


def _list_of(linears: NamedLinears) -> str:
    if not linears:
        return "The model has no linears."
    globs = list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", fqn) for fqn in linears))
    return f"Its linears are: {listed(linears, 20)}. All of them: wrap(model, filter_fn={globs})."
