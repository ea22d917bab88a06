"""Access to a fused tensor from outside of its linear's forward.

Note [Lost writes]
`linear.weight` is a new tensor at each access, so an in-place write to it, or to its `.data`, does
not reach the experts. On a dense model it would count, and others rely on that: initialization
code, adapters that merge, quantization, offloading. So what is handed out is remembered
(handed_out.py), and the next access, `state_dict`, copy or optimizer step raises after a write.

Reads within the linear's own forward are not remembered, and it looks only at what was read since
the last check, so training does not pay for this. A penalty on `linear.weight` in the loss pays for
a copy and a comparison at each step. Nothing is remembered within torch.compile, function
transforms and CUDA graphs, so a write in compiled code is not seen.

Note [Unfilled stacks]
`to_empty` gives a stack that was on the meta device memory with arbitrary contents. The linear's
class fills it with NaN (linear_class.py), and the first access raises if any is left.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..fusion_weights.empty_banks import warn_of_empty_bank_once
from ..tensors.readable import is_capturing
from ..tensors.shards import is_sharded, local
from .expert_fusion import ExpertFusion
from .handed_out import forget, found_write, is_any_handed_out, remember
from .refused_edits import refuse_functional_call


class _Running(threading.local):
    linear: nn.Module | None = None


_running = _Running()


def watched(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A linear's forward, within which reading its fused tensors is nothing special."""

    def watched_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        outer, _running.linear = _running.linear, self
        try:
            return forward(self, *args, **kwargs)
        finally:
            _running.linear = outer

    return watched_forward


def read(linear: Any, name: str) -> Tensor:
    """The value of a parametrized tensor; raises if something went wrong before."""
    parametrized = linear.parametrizations[name]
    if _is_recorded() or not isinstance(parametrized[0], ExpertFusion):
        return parametrized()
    is_own = _running.linear is linear
    require_sound(linear, name, is_own_forward=is_own)
    fused = computed(linear, name)
    if not is_own:
        group = parametrized[0].fusion_weights
        is_in_forward = getattr(group, "current", None) is not None
        is_empty = not is_in_forward and group.is_empty()
        remember(parametrized[0], fused, is_in_forward=is_in_forward, is_empty=is_empty)
    return fused


def computed(linear: Any, name: str) -> Tensor:
    """The fused tensor, through what was registered on top of it, as `spectral_norm`.

    Raises:
        RuntimeError: that cannot be on top of experts, as `weight_norm`.
    """
    parametrized = linear.parametrizations[name]
    if len(parametrized) == 1:
        return parametrized()
    try:
        return parametrized()
    except TypeError as error:
        raise RuntimeError(
            f"{type(parametrized[-1]).__name__} was registered on {_named(linear, name)} after "
            "wrap(), and does not compute from one tensor, as the experts fuse to. Call "
            f"fuse(model) first, and register it then ({error})."
        ) from error


def require_sound(linear: Any, name: str, *, is_own_forward: bool = False) -> None:
    """Raise a RuntimeError if a write to a fused tensor was lost, or its stack was never filled.

    Args:
        linear: the wrapped linear.
        name: of the tensor.
        is_own_forward: whether the linear itself reads it; numbers are compared only of what was
            read since the last check then.
    """
    if _is_recorded():
        return
    parametrized = linear.parametrizations[name]
    fusion = parametrized[0]
    if fusion.is_unfilled:
        _require_filled(linear, name, parametrized.original)
        fusion.is_unfilled = False
    if not is_capturing(parametrized.original):
        _require_no_write(linear, name, is_own_forward)


def require_no_writes(linear: Any) -> None:
    """Raise a RuntimeError if a write to one of a linear's fused tensors was lost."""
    if is_any_handed_out() and not _is_recorded():
        for name, fusions in linear.parametrizations.items():
            if isinstance(fusions[0], ExpertFusion) and not is_capturing(fusions.original):
                _require_no_write(linear, name, False)


def _require_no_write(linear: Any, name: str, only_fresh: bool) -> None:
    if found_write(linear.parametrizations[name][0], only_fresh=only_fresh):
        raise RuntimeError(
            f"An in-place write to {_named(linear, name)} is lost: under "
            'fuse_on="forward" it is computed from the experts at each access. Assign a tensor, '
            f"linear.{name} = tensor; initialize before wrap(); call fuse(model) before merging "
            'adapters or quantizing; or wrap with fuse_on="step" (not for MEO).'
        )


def assign(linear: Any, name: str, value: Tensor | None) -> None:
    """Let a parametrized tensor be what the user assigns to it.

    Raises:
        TypeError: it is None.
        ValueError: it has another shape, or is a tensor subclass that experts cannot have.
        RuntimeError: `functional_call` assigns it.
    """
    refuse_functional_call(name)
    parametrized = linear.parametrizations[name]
    fusion = parametrized[0]
    if not isinstance(fusion, ExpertFusion):
        parametrized.right_inverse(value)
        return
    if value is None:
        raise TypeError(
            f"{name!r} cannot be None in a wrapped linear: it is fused from experts. Take it off "
            "before wrap(), or after fuse(model)."
        )
    is_plain = type(value.data) is Tensor or is_sharded(value)
    if not is_plain or value.shape != parametrized.original.shape[1:]:
        raise ValueError(
            f"Only a plain tensor of its shape can be assigned to {_named(linear, name)}, got a "
            f"{type(value.data).__name__} of shape {tuple(value.shape)}. Call fuse(model) before "
            'quantizing or replacing it, or wrap with fuse_on="step" (not for MEO).'
        )
    parametrized.right_inverse(value)
    forget(fusion)
    fusion.is_unfilled = False
    warn_of_empty_bank_once(fusion.fusion_weights)


def require_own_parameter(linear: Any, name: str, parameter: object) -> None:
    """Raise a TypeError for a fused tensor that is to be a parameter, as pruning registers it."""
    if isinstance(parameter, Tensor) and not isinstance(parameter, nn.Parameter):
        raise TypeError(
            f"{name!r} cannot be registered as a parameter, as pruning does: it is computed from "
            "experts. Call fuse(model) first, or wrap with "
            'fuse_on="step" (not for MEO).'
        )


def spoil(stack: Tensor, fusion: ExpertFusion) -> None:
    """Mark a stack that has just got memory; see Note [Unfilled stacks]."""
    with torch.no_grad():
        local(stack).fill_(float("nan"))
    fusion.is_unfilled = True


def warn_if_unfilled(linear: Any) -> None:
    """Warn if what is saved of a linear is what `to_empty` left."""
    for parametrized in linear.parametrizations.values():
        if getattr(parametrized[0], "is_unfilled", False) and not _is_filled(parametrized.original):
            warnings.warn(
                "state_dict() of expert stacks that nothing has filled since to_empty(): they are "
                "NaN. Load into this state dict, and do not save it.",
                stacklevel=2,
            )
            return


def _is_recorded() -> bool:
    """Whether what runs is compiled, exported or traced, and nothing else may be in it."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def _require_filled(linear: nn.Module, name: str, stack: Tensor) -> None:
    if not _is_filled(stack):
        raise RuntimeError(
            f"The experts of {_named(linear, name)} hold what to_empty() left in memory. Call "
            "model.load_state_dict(state_dict), load_dense_state_dict(model, state_dict), or "
            "reset_parameters() of each module that has it."
        )


def _is_filled(stack: Tensor) -> bool:
    return stack.is_meta or not local(stack).isnan().any()


def _named(linear: Any, name: str) -> str:
    parametrized = linear.parametrizations[name]
    shape = tuple(parametrized.original.shape[1:])
    return f"the {name} of shape {shape} in {parametrized[0].fusion_weights.group!r}"
