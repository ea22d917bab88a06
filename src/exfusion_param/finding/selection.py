"""Which FFN groups to wrap: those that are found, or those that a filter chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import takewhile

from torch import nn

from .discovery import FFNGroup, candidate_linears, ffns_in_module, find_ffns, named_apart
from .left_out import left_out
from .mixtures import refuse_mixtures
from .outer_modules import globs_of, listed
from .projections import is_ffn, one_projection, projections_of

MOST = 8  # linears that a message lists
MOST_KINDS = 3  # of what looks like an FFN

Filter = Callable[[nn.Module, str], bool] | Sequence[str | Sequence[str]]
NamedLinears = Mapping[str, nn.Module]


def select_groups(
    model: nn.Module, filter_fn: Filter | None, layers: Sequence[int] | None
) -> list[FFNGroup]:
    """The FFN groups to wrap, in the order of the model.

    Args:
        model: any module.
        filter_fn: asked for each linear of the model, `filter_fn(module, fqn)`, or globs for the
            names of linears. Chosen linears of an FFN form its group; others form one group with
            the chosen linears beside them. A tuple of globs names the linears of each FFN itself,
            in the order in which they run. None takes the linears of all FFNs that are found.
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
        chosen, together = _chosen(linears, filter_fn)
        groups = _group(model, chosen, [*together, *groups])
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


def _chosen(linears: NamedLinears, filter_fn: Filter) -> tuple[NamedLinears, list[FFNGroup]]:
    """The linears that a filter accepts, and the groups that its tuples of globs name."""
    if callable(filter_fn):
        return {fqn: linear for fqn, linear in linears.items() if filter_fn(linear, fqn)}, []
    names: set[str] = set()
    together: list[FFNGroup] = []
    for entry in [filter_fn] if isinstance(filter_fn, str) else filter_fn:
        globs = [entry] if isinstance(entry, str) else list(entry)
        found = [_matching(linears, glob) for glob in globs]
        names.update(*found)
        if not isinstance(entry, str):
            together += _together(linears, globs, found)
    return {fqn: linear for fqn, linear in linears.items() if fqn in names}, together


def _matching(linears: NamedLinears, glob: str) -> list[str]:
    if found := [fqn for fqn in linears if fnmatchcase(fqn, glob)]:
        return found
    raise ValueError(f"The glob {glob!r} matches no linear. {_list_of(linears)}")


def _together(
    linears: NamedLinears, globs: Sequence[str], found: Sequence[Sequence[str]]
) -> list[FFNGroup]:
    """The groups that a tuple of globs names: the first match of each, the second of each, ..."""
    if len({len(names) for names in found}) > 1:
        raise ValueError(
            f"The globs {tuple(globs)} match {' and '.join(str(len(n)) for n in found)} "
            "linears. To name FFNs each has to match one linear of each FFN; give globs that "
            "match no others."
        )
    return [_as_group(names, linears) for names in zip(*found, strict=True)]


def _as_group(names: Sequence[str], linears: NamedLinears) -> FFNGroup:
    levels = zip(*(fqn.split(".")[:-1] for fqn in names), strict=False)
    around = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, levels)]
    maps = projections_of(linears[fqn] for fqn in names)
    inputs = names[:-1] if len(names) > 1 and is_ffn(maps) else names[:1]
    return FFNGroup(".".join(around), {fqn: linears[fqn] for fqn in names}, tuple(inputs))


def _group(model: nn.Module, chosen: NamedLinears, ffns: Sequence[FFNGroup]) -> list[FFNGroup]:
    """The chosen linears by FFN, or by the module that holds them if no FFN does."""
    ffn_of = {fqn: ffn for ffn in reversed(ffns) for fqn in ffn.linears}
    holders = {fqn: _holder_of(model, fqn) for fqn in chosen if fqn not in ffn_of}
    groups: dict[tuple[str, ...], FFNGroup] = {}
    for fqn in chosen:
        ffn = ffn_of.get(fqn)
        key = tuple(ffn.linears) if ffn else (holders[fqn],)
        if key not in groups:
            beside = [other for other, holder in holders.items() if holder == holders.get(fqn)]
            names = [n for n in ffn.linears if n in chosen] if ffn else beside
            inputs = [n for n in ffn.inputs if n in chosen] if ffn else []
            name = ffn.name if ffn else holders[fqn]
            linears = {n: chosen[n] for n in names}
            groups[key] = FFNGroup(name, linears, tuple(inputs or names[:1]))
    return named_apart(groups.values())


def _holder_of(model: nn.Module, fqn: str) -> str:
    """The module that holds a linear, seen through one that holds nothing else."""
    holder = fqn.rpartition(".")[0]
    while holder and one_projection(model.get_submodule(holder)) is not None:
        holder = holder.rpartition(".")[0]
    return holder


def _at(groups: Sequence[FFNGroup], layers: Sequence[int]) -> list[FFNGroup]:
    for index in layers:
        if not -len(groups) <= index < len(groups):
            raise ValueError(f"layers names FFN group {index}; the model has {len(groups)}.")
    indices = sorted({index % len(groups) for index in layers})
    return [groups[index] for index in indices]


def _nothing_matched(model: nn.Module, linears: NamedLinears, filter_fn: Filter | None) -> str:
    what = "No FFN was found" if filter_fn is None else "filter_fn accepts no linear"
    text = f"{what} in {type(model).__name__}. {_list_of(linears)}"
    looks = [f" {k.linears} look like one. {k.way_out}" for k in left_out(model, ())[:MOST_KINDS]]
    return "".join([text, *looks])


def _list_of(linears: NamedLinears) -> str:
    if not linears:
        return "The model has no linears."
    globs = globs_of(linears)
    some = globs if len(globs) <= MOST else [*globs[:MOST], "..."]
    return (
        f"Its linears are: {listed(linears, MOST)}. To choose among them: wrap(model, "
        f"filter_fn={some})."
    )
