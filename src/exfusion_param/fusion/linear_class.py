"""The class of a wrapped linear.

Note [The class of a wrapped linear]
`torch.nn.utils.parametrize` gives each parametrized module a class of its own, with a property for
each parametrized tensor. We replace it by one that differs in these ways:
- It is shared by all linears of one kind. torch.compile guards on the class of each module: with
  classes of their own, the blocks of a model that is compiled block by block would each be compiled
  again, up to the eighth, and the others not at all.
- `forward` of linears whose fusion weights follow the input shows it to them first. A hook could,
  but `nn.TransformerEncoderLayer` leaves its eval fast path where a module in it has hooks.
- `reset_parameters` draws every expert again. The inherited one would write to a temporary weight.
- Its properties and its `forward` notice writes that would be lost (outside_access.py).
- `_apply` marks stacks that get memory without contents.
- `state_dict` and `deepcopy` raise after a lost write, and `state_dict` warns of such stacks.
All of it goes away with the class when the parametrizations are removed.

Note [Properties that outlive a parametrization]
torch's `remove_parametrizations` deletes the property from the module's class, which would break
the linears that share it (and, with torch's own classes, breaks the original of a deepcopy). So the
metaclass ignores the deletion. Where nothing is parametrized any more, the properties raise
AttributeError, and Python falls back to `nn.Module.__getattr__`, which finds the plain parameter.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..finding.place import PlaceInGroup, input_of
from ..tensors.precision import leaves_memory_unset
from ..tensors.shards import assign, is_sharded
from . import outside_access
from .expert_fusion import ExpertFusion
from .refused_edits import (
    OwnParameters,
    half_removed,
    qconfig_property,
    refuse_deletion,
    split_property,
)

_shared: weakref.WeakValueDictionary[Any, type] = weakref.WeakValueDictionary()


def share_class(
    linear: nn.Module, dense_order: tuple[str, ...], place: PlaceInGroup | None
) -> None:
    """Give a linear, fresh from `register_parametrization`, the class of its kind.

    Args:
        linear: the parametrized linear.
        dense_order: the names of the dense linear's parameters, in their order.
        place: where its fusion weights run it; None leaves the dense class's `forward`.
    """
    made = type(linear)
    dense: Any
    (dense,) = made.__bases__  # torch has just made it, a subclass of the linear's dense class
    fused = tuple(name for name, member in vars(made).items() if isinstance(member, property))
    kind = (dense, fused, dense_order, place)
    shared = _shared.get(kind)
    if shared is None:
        # torch's members stay (among them those that deepcopy and pickle ask for), ours override.
        members = dict(vars(made)) | {name: _property(name) for name in fused}
        members |= {"_dense_order": dense_order, "_fused": fused}
        if hasattr(dense, "reset_parameters"):
            members["reset_parameters"] = _reset_experts
        members["extra_repr"] = _describe
        forward = dense.forward if place is None else _routed(dense, place)
        members["forward"] = outside_access.watched(forward)
        members |= {"_apply": _moving(dense), "register_parameter": _registering(dense)}
        members["_save_to_state_dict"] = _saving(dense)
        members["qconfig"] = qconfig_property()
        members["_distribute_module_applied"] = split_property()
        members["__deepcopy__"] = _copying(members.get("__deepcopy__") or dense.__deepcopy__)
        shared = _shared[kind] = _metaclass(dense)(made.__name__, made.__bases__, members)
    linear.__class__ = shared  # as torch has done for `made`
    linear._parameters = OwnParameters(linear._parameters)


def dense_order(linear: nn.Module) -> tuple[str, ...]:
    """The names of a wrapped linear's parameters, in the order of the dense one."""
    return type(linear)._dense_order  # type: ignore[attr-defined]


class _SharedClass(type):
    """The metaclass that Note [Properties that outlive a parametrization] asks for."""

    def __setattr__(cls, name: str, value: Any) -> None:
        super().__setattr__(name, _property(name) if isinstance(value, property) else value)

    def __delattr__(cls, name: str) -> None:
        if not isinstance(vars(cls).get(name), property):  # other linears may need that
            super().__delattr__(name)


def _metaclass(dense: type) -> type:
    if type(dense) is type:
        return _SharedClass
    # A dense class with a metaclass of its own: Python wants one that derives from both.
    return type("_SharedClass", (_SharedClass, type(dense)), {})


def _property(name: str) -> property:
    """A parametrized tensor. It is not cached: torch caches for one module of each class."""

    def get(self: Any) -> Tensor:
        if name not in self.parametrizations:
            raise AttributeError(name)  # Python asks nn.Module.__getattr__ next
        return outside_access.read(self, name)

    def set_originals(self: Any, value: Tensor) -> None:
        outside_access.assign(self, name, value)

    def refuse_deletion_of_fused(self: Any) -> None:
        refuse_deletion(name)

    return property(get, set_originals, refuse_deletion_of_fused)


def _routed(dense: Any, place: PlaceInGroup) -> Callable[..., Any]:
    """The `forward` for a dense class, run by the fusion weights until the last linear has run."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        def run_dense() -> Any:
            return dense.forward(self, *args, **kwargs)

        if "weight" not in self.parametrizations:
            raise half_removed(self)
        weights = self.parametrizations.weight[0].fusion_weights
        try:
            return weights.run(self, input_of(args, kwargs), place, run_dense)
        finally:
            if place.is_last:
                weights.end_forward()

    return forward


def _moving(dense: Any) -> Callable[..., Any]:
    """The `_apply` for a dense class; `to_empty` leaves no stack that looks like experts."""

    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # `fn` does not tell which tensor it gets, so stacks are known by their shapes.
        stacks = {each.original.shape for each in self.parametrizations.values()}

        @functools.wraps(fn)  # fusion weights below ask what `fn` is
        def apply(tensor: Tensor) -> Tensor:
            if tensor.ndim < 4 or tensor.shape not in stacks or is_sharded(tensor):
                return fn(tensor)
            # A stack of a convolution, moved as the dense weight is: to channels_last, for one.
            return fn(tensor.flatten(0, 1)).unflatten(0, tensor.shape[:2])

        fused = [h for h in self.parametrizations.values() if isinstance(h[0], ExpertFusion)]
        emptied = [h for h in fused if h.original.is_meta or leaves_memory_unset(fn)]
        dense._apply(self, apply, recurse)
        for each in emptied:
            if not each.original.is_meta:
                outside_access.spoil(each.original, each[0])
        return self

    return _apply


def _registering(dense: Any) -> Callable[..., None]:
    """The `register_parameter` for a dense class: `linear.weight = nn.Parameter(t)` ends there."""

    def register_parameter(self: Any, name: str, param: nn.Parameter | None) -> None:
        if param is not None and name in self.__dict__["_modules"].get("parametrizations", ()):
            outside_access.assign(self, name, param)
            return
        outside_access.require_own_parameter(self, name, param)
        dense.register_parameter(self, name, param)

    return register_parameter


def _saving(dense: Any) -> Callable[..., None]:
    """The `_save_to_state_dict` for a dense class: no state dict without a write that was meant."""

    def _save_to_state_dict(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        outside_access.require_no_writes(self)
        if not keep_vars:  # which is not for saving
            outside_access.warn_if_unfilled(self)
        dense._save_to_state_dict(self, destination, prefix, keep_vars)

    return _save_to_state_dict


def _copying(deepcopy: Callable[..., Any]) -> Callable[..., Any]:
    """The `__deepcopy__` around torch's, which copies no write that was lost."""

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:  # noqa: N807
        outside_access.require_no_writes(self)
        return deepcopy(self, memo)

    return __deepcopy__


def _reset_experts(self: Any) -> None:
    """Let the dense class's `reset_parameters` draw each expert, in place.

    The ranks of a sharded model draw whole experts, each the same ones, and keep their parts.
    """
    scratch = _dense_without_tensors(self)
    stacks = {name: self.parametrizations[name].original for name in self._fused}
    drawn = {
        name: torch.empty(stack.shape, dtype=stack.dtype, device=stack.device)
        if is_sharded(stack)
        else stack.detach()
        for name, stack in stacks.items()
    }
    # Along the first dimension: the weight and the bias of one expert at a time. `nn.Parameter`
    # shares their memory, so that the draws land in the stack.
    for expert in zip(*drawn.values(), strict=True):
        scratch._parameters.update(zip(drawn, map(nn.Parameter, expert), strict=True))
        scratch.reset_parameters()
    for name, stack in stacks.items():
        if is_sharded(stack):
            assign(stack, drawn[name])


def _describe(self: Any) -> str:
    """The dense class's `extra_repr`, without computing a fused tensor."""
    scratch = _dense_without_tensors(self)
    shapes = {name: self.parametrizations[name].original.shape[1:] for name in self._fused}
    like = {name: nn.Parameter(torch.empty(s, device="meta")) for name, s in shapes.items()}
    scratch._parameters.update(like)
    return scratch.extra_repr()


def _dense_without_tensors(self: Any) -> Any:
    """A dense linear without __init__ and without its own tensors: only what a method reads."""
    dense: Any = type(self).__bases__[0]
    scratch = dense.__new__(dense)
    scratch.__dict__ = {**vars(self), "_parameters": {**self._parameters}, "_modules": {}}
    return scratch
