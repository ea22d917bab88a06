"""Finds linears that look like an FFN but are not wrapped, for `wrap` and `summarize` to report."""

from __future__ import annotations

import itertools
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from .attention import attention_of
from .outer_modules import globs_of
from .projections import (
    Projection,
    is_wide_ffn,
    projection_of,
    projections_beside,
    projections_of,
)
from .structure import is_spatial

MOST = 5  # kinds that are listed one by one


class LeftOut(NamedTuple):
    """Linears of one kind that look like an FFN.

    Args:
        ffns: how many there are.
        widths: "D -> H -> D".
        linears: globs for the linears of each.
        way_out: how to take just these.
    """

    ffns: int
    widths: str
    linears: str
    way_out: str


def warn_of_left_out(model: nn.Module, taken: Collection[nn.Module]) -> None:
    """Warn, once for each kind, of linears that look like an FFN and are not among these."""
    kinds = left_out(model, taken)
    for kind in kinds[:MOST]:
        warnings.warn(
            f"wrap() leaves {kind.ffns} x {kind.widths} dense, which looks like an FFN: "
            f"{kind.linears}. {kind.way_out}",
            stacklevel=2,
        )
    if len(kinds) > MOST:
        warnings.warn(
            f"wrap() leaves {len(kinds) - MOST} more kinds of linears dense that look like FFNs.",
            stacklevel=2,
        )


def left_out(model: nn.Module, taken: Collection[nn.Module]) -> list[LeftOut]:
    """The kinds of linears that look like an FFN and are not among these linears."""
    kinds: dict[tuple[str, tuple[str, ...]], list[tuple[str, ...]]] = defaultdict(list)
    for names, widths in _rows_of(model, taken):
        kinds[widths, tuple(globs_of([name])[0] for name in names)].append(names)
    found = []
    for (widths, _), rows in kinds.items():
        globs = tuple(map(_glob_of, zip(*rows, strict=True)))
        linears = f"{', '.join(globs[:-1])} and {globs[-1]}"
        found.append(LeftOut(len(rows), widths, linears, _way_out(model, globs, rows)))
    return found


def _glob_of(names: Sequence[str]) -> str:
    """A glob for names that differ in numbers only, with a star for each that differs."""
    parts = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(part[0] if len(set(part)) == 1 else "*" for part in parts)


def _way_out(model: nn.Module, globs: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A filter that takes just these: globs, or names where globs match others too."""
    modules = dict(model.named_modules())
    if not all(name in modules and projection_of(modules[name]) for name in rows[0]):
        return (
            "Only linears can be wrapped: make each a torch.nn.Linear, whose weight is (out, in)."
        )
    matched = [[fqn for fqn in modules if fnmatchcase(fqn, glob)] for glob in globs]
    if all(len(found) == len(rows) for found in matched):
        return f"wrap(model, filter_fn=[{globs}]) takes these."
    these = "these" if len(rows) <= MOST else f"the first {MOST} of these"
    return f"wrap(model, filter_fn={list(rows[:MOST])}) takes {these}."


def _rows_of(
    model: nn.Module, taken: Collection[nn.Module]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """The names of the linears of each that looks like an FFN, and its widths D, H and D."""
    attention = attention_of(model)
    seen = {*taken, *attention}
    # Where nothing is taken, those of all linears.
    widths_taken = {p.in_features for p in projections_of(taken or model.modules())}
    for fqn, module in reversed(dict(model.named_modules()).items()):
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue
        rows = [*_beside_attentions_inputs(module, taken)]
        if module not in attention:
            rows += [*_rows(module, seen), *_of_matrices(module, widths_taken)]
        for names, widths in rows:
            prefix = f"{fqn}." if fqn else ""
            yield tuple(prefix + name for name in names), " -> ".join(map(str, widths))


def _rows(
    module: nn.Module, seen: set[nn.Module]
) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Rows of a module's projections, D to H and on to D with H > D; they are then seen."""
    linears = projections_beside(module)
    rest = [name for name, linear in linears.items() if linear not in seen]
    for index, first in enumerate(rest):
        for end, last in enumerate(rest[index + 1 :], index + 1):
            pair = [linears[first], linears[last]]
            up, down = (projection_of(linear) for linear in pair)
            if up is None or down is None or not seen.isdisjoint(pair):
                continue
            if is_wide_ffn([up, down]) and _in_turn(module, pair, seen):
                inner = [n for n in rest[index + 1 : end] if _runs_within(linears[n], up)]
                names = (first, *inner, last)
                seen.update(linears[name] for name in names)
                yield names, (up.in_features, up.out_features, down.out_features)


def _beside_attentions_inputs(
    module: nn.Module, taken: Collection[nn.Module]
) -> Iterator[tuple[tuple[str, ...], tuple[int | str, ...]]]:
    """The FFN of a parallel block whose first linear makes the inputs of attention as well.

    That linear maps D to K, and two or more others map their parts of it back to D, one of them
    from H > D, as in PaLM and ViT-22B.
    """
    linears = {n: each for n, each in projections_beside(module).items() if each not in taken}
    if len(linears) < 3:
        return
    (first, *others), (up, *outputs) = list(linears), projections_of(linears.values())
    read = [p.in_features for p in outputs]
    hidden = max(read)
    are_back = all(p.out_features == up.in_features for p in outputs)
    if are_back and up.in_features < hidden and sum(read) <= up.out_features:
        last = next(n for n, p in zip(others, outputs, strict=True) if p.in_features == hidden)
        yield (first, last), (up.in_features, f"{hidden} of {up.out_features}", up.in_features)


def _runs_within(linear: nn.Module, up: Projection) -> bool:
    """Whether it maps H to H, between those of an FFN of three."""
    inner = projection_of(linear)
    return inner is not None and {inner.in_features, inner.out_features} == {up.out_features}


def _of_matrices(
    module: nn.Module, widths: Collection[int]
) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Pairs of matrices that are no linear's, D x H and H x D, where other FFNs have the same D."""
    matrices = dict(_matrices(module))
    for (first, up), (last, down) in itertools.pairwise(matrices.items()):
        width, hidden = sorted(up.shape)
        if up.shape == down.mT.shape and width in widths and width < hidden:
            yield (first, last), (width, hidden, width)


def _matrices(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The matrices of a module, and of the children that hold one, unless torch made them."""
    for prefix, holder in (("", module), *module.named_children()):
        own = [(n, p) for n, p in holder.named_parameters(recurse=False) if p.ndim == 2]
        is_torchs = type(holder).__module__.startswith("torch.")
        if not projection_of(holder) and not is_torchs and (holder is module or len(own) == 1):
            yield from ((prefix or name, parameter) for name, parameter in own)


def _in_turn(module: nn.Module, pair: Sequence[nn.Module], seen: Collection[nn.Module]) -> bool:
    """Whether neither attention, an FFN nor a convolution over tokens stands between."""
    modules = list(module.modules())
    first, last = map(modules.index, pair)
    between = modules[first + 1 : last]
    return not any(is_spatial(other) or other in seen for other in between)
