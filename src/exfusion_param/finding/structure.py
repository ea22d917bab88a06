"""Which linears of one module make up FFNs: by the names of `ffn_shapes`, or by structure."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import nn

from .ffn_shapes import FFN_NAME, FFN_SHAPES, OTHER_NAME, FFNShape, class_name
from .projections import (
    CONVOLUTIONS,
    Projection,
    is_ffn,
    is_wide_ffn,
    one_projection,
    projection_of,
    projections_beside,
    projections_of,
)

Linears = Mapping[str, nn.Module]


class Holder:
    """A module that may hold the linears of FFNs.

    Args:
        module: the module.
        around: its name in the model, and the modules around it that hold no other projections.
        attention: modules that are attention or lie inside of it.
        taken: linears of FFNs that were found further inside.
        is_beside_attention: attention is a child of the module that holds it, as in a layer.
        holds_attention: one of its children holds attention and no FFN.
    """

    def __init__(
        self,
        module: nn.Module,
        around: Mapping[str, nn.Module],
        attention: Collection[nn.Module],
        taken: Collection[nn.Module],
        is_beside_attention: bool,
        holds_attention: bool,
    ) -> None:
        self.module, self.attention, self.taken = module, attention, set(taken)
        self.is_beside_attention = is_beside_attention
        self.holds_attention = holds_attention
        names = [(fqn.rpartition(".")[2], class_name(each)) for fqn, each in around.items()]
        self.is_called_ffn = any(map(FFN_NAME.search, names[0]))
        self.is_called_other = any(OTHER_NAME.search(name) for pair in names for name in pair)
        is_numbered = any(part.isdigit() for fqn in around for part in fqn.split("."))
        self.is_in_layer = is_numbered or is_beside_attention or holds_attention

    def ffns(self) -> Iterator[tuple[Linears, bool]]:
        """The FFNs that it holds, first those whose linears have names that are known.

        Yields:
            The linears of one; and whether it may be a head or an embedding as well, as nothing but
            their widths tells, and it is not part of a layer.
        """
        # What lists hold need not run in turn, unless names tell.
        is_list = isinstance(self.module, nn.ModuleList | nn.ModuleDict)
        ways = (self._by_name, self._by_structure, self._in_turn)
        for find in ways[:1] if is_list else ways:
            for linears in find():
                if linears and self.taken.isdisjoint(linears.values()):
                    self.taken.update(linears.values())
                    is_known = find == self._by_name or self.is_called_ffn or self.is_in_layer
                    yield linears, not is_known

    def _by_name(self) -> Iterator[Linears]:
        children = {name for name, _ in self.module.named_children()}
        for shape in FFN_SHAPES:
            is_there = children.issuperset(name.partition(".")[0] for name in shape.inputs)
            if is_there and shape.holder.search(class_name(self.module)):
                yield self._fitting(shape)

    def _by_structure(self) -> Iterator[Linears]:
        """Two or three linears, directly in the module or anywhere below it."""
        children = {n: m for n, m in self.module.named_children() if self._may_be_part(m)}
        below = {n: m for n, m in self.module.named_modules() if self._may_be_part(m)}
        for linears in (children, below):
            if len(linears) in (2, 3) and self._is_ffn(linears) and self._is_only_linears(linears):
                yield linears
                return

    def _fitting(self, shape: FFNShape) -> Linears:
        names = (*shape.inputs, shape.output)
        below = dict(self.module.named_modules(remove_duplicate=False))
        found = [one_projection(below.get(name)) for name in names]
        first_names = {module: name for name, module in reversed(below.items())}
        linears = {first_names[linear]: linear for linear in found if linear is not None}
        if len(linears) < len(names) or not self._fits(projections_of(linears.values())):
            return {}
        # An adapter's down_proj is registered before its up_proj.
        first, last = self._positions(linears)
        is_pointwise = any(isinstance(linear, CONVOLUTIONS) for linear in linears.values())
        if is_pointwise and not self.is_called_ffn and not self._is_ffn(linears):
            return {}
        return linears if first < last else {}

    def _fits(self, maps: Sequence[Projection]) -> bool:
        first, last = maps[0], maps[-1]
        if 2 * last.in_features <= first.in_features:
            return False
        # In a layer of a pyramid the FFN may widen its output, as in MViTv2.
        widens = 2 * max(first.in_features, last.out_features) <= last.in_features
        free = self.is_called_ffn and self.is_beside_attention and widens
        return is_ffn(maps, any_output=free)

    def _is_ffn(self, linears: Linears) -> bool:
        maps = projections_of(linears.values())
        return is_wide_ffn(maps) and self._may_mix(linears)

    def _in_turn(self) -> Iterator[Linears]:
        """FFNs in a row of linears beside attention, in the order of their registration."""
        beside = projections_beside(self.module) if self.holds_attention else {}
        rest = [(n, linear) for n, linear in beside.items() if self._may_be_part(linear)]
        while len(rest) > 1:
            for length in (3, 2):
                part = dict(rest[:length])
                if len(part) == length and self._is_ffn(part):
                    yield part
                    rest = rest[length:]
                    break
            else:
                rest = rest[1:]

    def _may_be_part(self, module: nn.Module) -> bool:
        """Whether it may be part of an FFN by structure; convolutions need a telling name."""
        is_free = module not in self.attention and module not in self.taken
        is_named = self.is_called_ffn or not isinstance(module, CONVOLUTIONS)
        return is_free and is_named and projection_of(module) is not None

    def _may_mix(self, linears: Linears) -> bool:
        """Whether no convolution over tokens runs between, as in an inverted bottleneck."""
        if self.is_called_ffn:
            return True
        first, last = self._positions(linears)
        return not any(map(is_spatial, list(self.module.modules())[first:last]))

    def _positions(self, linears: Linears) -> tuple[int, int]:
        """Of the first and the last in the order in which modules are registered."""
        modules = list(self.module.modules())
        first, *_, last = linears.values()
        return modules.index(first), modules.index(last)

    def _is_only_linears(self, linears: Linears) -> bool:
        """Whether neither convolutions nor other weights follow, as in mixers of tokens."""
        first, _ = self._positions(linears)
        follows = any(map(is_spatial, list(self.module.modules())[first:]))
        own = self.module.parameters(recurse=False)
        has_own = any(sum(size > 1 for size in tensor.shape) > 1 for tensor in own)
        return not has_own and (self.is_called_ffn or not follows)


def is_spatial(module: nn.Module) -> bool:
    """Whether a module runs over more than one token: a convolution, or a recurrent layer."""
    is_convolution = isinstance(module, CONVOLUTIONS) and math.prod(module.kernel_size) > 1
    return is_convolution or isinstance(module, nn.RNNBase)
