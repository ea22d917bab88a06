"""Finds the FFN groups of a model: which linears make up an FFN, in the order in which they run.

First by name (ffn_shapes.py), then by structure (structure.py): a module with just two linears, D
to H and H back to D with H > D, or with two of D to H for a gated FFN; and such linears in a row
where attention stands beside them. Nothing inside of attention counts (attention.py), nor does what
only structure tells outside of layers, unless there is nothing else. What neither finds, a filter
can name (selection.py).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from itertools import takewhile

from torch import nn

from .attention import attention_of
from .projections import projection_of
from .structure import Holder


@dataclasses.dataclass(frozen=True)
class FFNGroup:
    """The linears of one FFN, which share fusion weights.

    Args:
        name: name in the model of the module that holds them.
        linears: each linear by its name in the model, in the order in which they run.
        inputs: names of those that read the FFN's input, the first linear among them.
    """

    name: str
    linears: Mapping[str, nn.Module]
    inputs: tuple[str, ...]


def candidate_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every projection of the model by its name, wrapped ones included."""
    return {fqn: module for fqn, module in model.named_modules() if projection_of(module)}


def find_ffns(model: nn.Module) -> list[FFNGroup]:
    """All FFNs of the model, in its order; each linear in one, held by the smallest module."""
    modules = dict(model.named_modules())
    attention = attention_of(model)
    blocks = {m for m in modules.values() if not attention.isdisjoint(m.children())}
    inside_blocks = {child for block in blocks - attention for child in block.children()}
    groups: list[FFNGroup] = []
    unsure: list[FFNGroup] = []
    taken: set[nn.Module] = set()
    counts = Counter(part for name in candidate_linears(model) for part in parents_of(name))
    mixers = set(attention)  # modules that hold attention, and no FFN
    for fqn, module in reversed(modules.items()):  # what is inside of a module comes before it
        if module in attention:
            continue
        holder = Holder(
            module,
            _around(modules, fqn, counts),
            attention,
            taken,
            is_beside_attention=module in inside_blocks,
            holds_attention=not mixers.isdisjoint(module.children()),
        )
        for own, is_unsure in holder.ffns():
            linears = {_join(fqn, name): linear for name, linear in own.items()}
            # A linear that several modules hold belongs to the first, by whose name it is known.
            if linears.keys() <= modules.keys() and taken.isdisjoint(linears.values()):
                taken.update(linears.values())
                if not holder.is_called_other:
                    kind = unsure if is_unsure else groups
                    kind.append(FFNGroup(fqn, linears, tuple(linears)[:-1]))
        if not mixers.isdisjoint(module.children()) and taken.isdisjoint(module.modules()):
            mixers.add(module)
    rank = {fqn: index for index, fqn in enumerate(modules)}
    return named_apart(sorted(groups or unsure, key=lambda group: rank[group.inputs[0]]))


def parents_of(fqn: str) -> list[str]:
    """The names of the modules that hold a module, the innermost first, the model's last."""
    parts = fqn.split(".")
    return [".".join(parts[:length]) for length in reversed(range(len(parts)))]


def _around(
    modules: Mapping[str, nn.Module], fqn: str, counts: Mapping[str, int]
) -> dict[str, nn.Module]:
    """A module, and those around it that hold no projections but its own."""
    parents = takewhile(lambda name: name and counts[name] == counts[fqn], parents_of(fqn))
    return {name: modules[name] for name in (fqn, *parents)}


def named_apart(groups: Iterable[FFNGroup]) -> list[FFNGroup]:
    """The groups, those of one module named by the part of it that runs first."""
    groups = list(groups)
    counts = Counter(group.name for group in groups)
    return [
        dataclasses.replace(group, name=_first_part(group)) if counts[group.name] > 1 else group
        for group in groups
    ]


def _first_part(group: FFNGroup) -> str:
    rest = next(iter(group.linears)).removeprefix(group.name).removeprefix(".")
    return _join(group.name, rest.partition(".")[0])


def ffns_in_module(module: nn.Module) -> list[Collection[nn.Module]]:
    """The FFNs whose linears this module holds, other than those of modules inside of it."""
    holder = Holder(module, {"": module}, attention_of(module), (), False, True)
    return [set(linears.values()) for linears, _ in holder.ffns()]


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
