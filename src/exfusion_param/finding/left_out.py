"""What looks like an FFN and is not wrapped, for `wrap` and `summarize` to report."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from .attention import attention_of
from .outer_modules import globs_of
from .projections import is_wide_ffn, one_projection, projection_of
from .structure import is_spatial

MOST = 5  # kinds that are listed one by one


class LeftOut(NamedTuple):
    """Linears of one kind that look like an FFN.

    Args:
        ffns: how many there are.
        widths: "D -> H -> D".
        first: a glob for the first linear of each.
        last: a glob for the last one.
        filter: takes just these, as `wrap(model, filter_fn=...)`.
    """

    ffns: int
    widths: str
    first: str
    last: str
    filter: str


def warn_of_left_out(model: nn.Module, taken: Collection[nn.Module]) -> None:
    """Warn, once for each kind, of linears that look like an FFN and are not among these."""
    kinds = left_out(model, taken)
    for kind in kinds[:MOST]:
        warnings.warn(
            f"wrap() leaves {kind.ffns} x {kind.widths} dense, which looks like an FFN: "
            f"{kind.first} and {kind.last}. wrap(model, filter_fn={kind.filter}) takes these.",
            stacklevel=2,
        )
    if len(kinds) > MOST:
        warnings.warn(
            f"wrap() leaves {len(kinds) - MOST} more kinds of linears dense that look like FFNs.",
            stacklevel=2,
        )


def left_out(model: nn.Module, taken: Collection[nn.Module]) -> list[LeftOut]:
    """The kinds of linears that look like an FFN and are not among these linears."""
    kinds: dict[tuple[str, str, str], list[tuple[str, str]]] = defaultdict(list)
    for pair, widths in _pairs_of(model, taken):
        first, last = (globs_of([name])[0] for name in pair)
        kinds[widths, first, last].append(pair)
    return [
        LeftOut(len(pairs), *kind, _filter_for(model, kind[1:], pairs))
        for kind, pairs in kinds.items()
    ]


def _filter_for(model: nn.Module, globs: tuple[str, str], pairs: Sequence[tuple[str, str]]) -> str:
    """A filter that takes just these: globs, or names where globs match others too."""
    names = [fqn for fqn, _ in model.named_modules()]
    matched = [[fqn for fqn in names if fnmatchcase(fqn, glob)] for glob in globs]
    if all(len(found) == len(pairs) for found in matched):
        return f"[{globs}]"
    more = ", ..." if len(pairs) > 1 else ""
    return f"[{pairs[0]}{more}]"


def _pairs_of(
    model: nn.Module, taken: Collection[nn.Module]
) -> Iterator[tuple[tuple[str, str], str]]:
    """The names of each pair that looks like an FFN, and its widths D, H and D."""
    attention = attention_of(model)
    seen = {*taken, *attention}
    for fqn, module in reversed(dict(model.named_modules()).items()):
        if module not in attention and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            for (first, last), widths in _pairs(module, seen):
                prefix = f"{fqn}." if fqn else ""
                yield (prefix + first, prefix + last), " -> ".join(map(str, widths))


def _pairs(
    module: nn.Module, seen: set[nn.Module]
) -> Iterator[tuple[tuple[str, str], tuple[int, ...]]]:
    """Pairs of a module's projections, D to H and on to D with H > D; they are then seen."""
    linears = _projections(module)
    rest = [name for name, linear in linears.items() if linear not in seen]
    for index, first in enumerate(rest):
        for last in rest[index + 1 :]:
            pair = [linears[first], linears[last]]
            up, down = (projection_of(linear) for linear in pair)
            if up is None or down is None or not seen.isdisjoint(pair):
                continue
            if is_wide_ffn([up, down]) and _in_turn(module, pair, seen):
                seen.update(pair)
                yield (first, last), (up.in_features, up.out_features, down.out_features)


def _projections(module: nn.Module) -> Mapping[str, nn.Module]:
    """A module's projections, and the only ones of its children."""
    found = {name: one_projection(child) for name, child in module.named_children()}
    paths = {child: path for path, child in module.named_modules()}
    return {paths[linear]: linear for linear in found.values() if linear is not None}


def _in_turn(module: nn.Module, pair: Sequence[nn.Module], seen: Collection[nn.Module]) -> bool:
    """Whether neither attention, an FFN nor a convolution over tokens stands between."""
    modules = list(module.modules())
    first, last = map(modules.index, pair)
    between = modules[first + 1 : last]
    return not any(is_spatial(other) or other in seen for other in between)
