"""The modules that are a linear in all but name: what they map, and where their features lie.

`torch.nn.Linear` and its subclasses, convolutions with a kernel of one (their weight is a
linear's), and the `Conv1D` of transformers' GPT-2, whose weight is (in, out).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ADAPTED = "base_layer"
"""Name of the linear inside of an adapter of peft, which stands in its place and maps the same."""

_TRANSPOSED = "transformers.pytorch_utils.Conv1D"


@dataclasses.dataclass(frozen=True)
class Projection:
    """A map of features.

    Args:
        in_features: D of its input.
        out_features: of its output.
        feature_dim: dimension of its input that holds the features, counted from the end.
        weight_out: dimension of its weight that runs over the output's features.
        weight_in: dimension of its weight that runs over the input's features.
    """

    in_features: int
    out_features: int
    feature_dim: int = -1
    weight_out: int = 0
    weight_in: int = 1


def projection_of(module: nn.Module) -> Projection | None:
    """The dimensions that a module maps, or None if it is not a projection."""
    if isinstance(module, nn.Linear):
        return Projection(module.in_features, module.out_features)
    if isinstance(module, CONVOLUTIONS):
        is_pointwise = math.prod(module.kernel_size) == 1 and module.groups == 1
        dim = -len(module.kernel_size) - 1
        return Projection(module.in_channels, module.out_channels, dim) if is_pointwise else None
    if any(f"{cls.__module__}.{cls.__qualname__}" == _TRANSPOSED for cls in type(module).__mro__):
        conv: Any = module
        return Projection(conv.nx, conv.nf, weight_out=1, weight_in=0)
    if (adapted := dict(module.named_children()).get(ADAPTED)) is not None:
        return projection_of(adapted)
    return None


def projections_of(modules: Iterable[nn.Module]) -> list[Projection]:
    """The dimensions that the modules map, without those that are not projections."""
    return [p for p in map(projection_of, modules) if p is not None]


def is_ffn(maps: Sequence[Projection], any_output: bool = False) -> bool:
    """Whether all but the last map D to H and the last maps H, or one half of it, back to D."""
    *first, last = maps
    widths = {(p.in_features, p.out_features) for p in first}
    if len(widths) != 1:
        return False
    ((features, hidden),) = widths
    is_back = any_output or last.out_features == features
    return last.in_features in (hidden, hidden / 2) and is_back


def is_wide_ffn(maps: Sequence[Projection]) -> bool:
    """Whether they map as an FFN's with H > D; with H < D it may be an adapter, or a gate."""
    return len(maps) > 1 and maps[0].out_features > maps[0].in_features and is_ffn(maps)


def one_projection(module: nn.Module | None) -> nn.Module | None:
    """A projection, or the only one of a module that has nothing else but norms and the like."""
    if module is None or isinstance(module, nn.ModuleList | nn.ModuleDict):
        return None
    weighty = list(_weighty(module))
    return weighty[0] if len(weighty) == 1 and projection_of(weighty[0]) else None


def projections_beside(module: nn.Module) -> dict[str, nn.Module]:
    """A module's own projections, and the only ones of its children, by their names in it."""
    names = {inner: name for name, inner in module.named_modules()}
    found = map(one_projection, module.children())
    return {names[linear]: linear for linear in found if linear is not None}


def _weighty(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that hold a matrix or more, projections as a whole."""
    if projection_of(module) or any(p.ndim > 1 for p in module.parameters(recurse=False)):
        yield module
    if not projection_of(module):
        for child in module.children():
            yield from _weighty(child)
