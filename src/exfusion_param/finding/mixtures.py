"""Models that are mixtures of experts already, which are refused.

A mixture has a router, a linear or a matrix from D to the number of experts (fewer than D), beside
them: FFNs of one shape in a list, or stacks of as many matrices. Some keep their experts otherwise
and are known by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn

from .discovery import FFNGroup
from .ffn_shapes import class_name
from .projections import projection_of

_CALLED = re.compile(
    r"Experts$|(MoE|MOE)(Layer|Block|MLP|Mlp)?$|^Moe(Layer|MLP|Mlp|Block|FFN)?$"
    r"|SparseMo[eE]|SparseMLP|MoeLayer(?!Norm)|MoeBlock|SwitchM(LP|lp)$|^FMo[eE]"
)
_EXPERTS = re.compile(r"(^|_)experts?(_?\d+|_list)?$")
_HEAD = re.compile(r"head|classifier|logits|out", re.IGNORECASE)


def refuse_mixtures(model: nn.Module, groups: Sequence[FFNGroup]) -> None:
    """Raise a ValueError if a model holds experts already, among which a router chooses."""
    ffns = {id(model.get_submodule(group.name)) for group in groups}
    for fqn, module in reversed(dict(model.named_modules()).items()):  # the inner ones first
        if _CALLED.search(class_name(module)) or _routes(module, ffns):
            raise ValueError(
                f"{class_name(model)} is a mixture of experts already: {fqn or 'the model'} is "
                f"a {class_name(module)}. Choose among its dense linears with filter_fn."
            )
    for group in groups:
        if any(map(_EXPERTS.search, group.name.split("."))):
            raise ValueError(
                f"{class_name(model)} is a mixture of experts already: {group.name} is called "
                "one of them. Choose among its dense linears with filter_fn."
            )


def _routes(module: nn.Module, ffns: set[int]) -> bool:
    """Whether a module holds experts, in a list or stacked, beside a router to their number."""
    choices = set(_router_outputs(module))
    nearby = [module, *module.children()]
    experts = {size for near in nearby for size in (*_lists(near, ffns), *_stacks(near))}
    return not choices.isdisjoint(experts)


def _router_outputs(module: nn.Module) -> Iterator[int]:
    """How many each linear of a module, or of a child of its own, chooses among."""
    for name, child in module.named_children():
        linear = projection_of(child)
        if linear is None and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            inner = [projection_of(each) for each in child.children()]
            linear = next((each for each in inner if each is not None), None)
        is_narrow = linear is not None and linear.out_features < linear.in_features
        if linear is not None and is_narrow and not _HEAD.search(name):
            yield linear.out_features
    for parameter in module.parameters(recurse=False):
        if parameter.ndim == 2 and 1 < parameter.shape[1] < parameter.shape[0]:  # x @ router
            yield parameter.shape[1]


def _lists(module: nn.Module, ffns: set[int]) -> Iterator[int]:
    """The lengths of its lists of FFNs of one shape."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict) and len(child) > 1:
            shapes = {tuple(p.shape for p in each.parameters()) for each in child.children()}
            if len(shapes) == 1 and all(id(each) in ffns for each in child.children()):
                yield len(child)


def _stacks(module: nn.Module) -> Iterator[int]:
    """The numbers of matrices that are stacked in parameters of its own."""
    for parameter in module.parameters(recurse=False):
        if parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, nn.Conv1d):
            yield len(parameter)
