"""Access to a fused tensor from outside of its linear's forward.

Note [Lost writes]
`linear.weight` is a new tensor at each access, so an in-place write to it, or to its `.data`, does
not reach the experts. On a dense model it would count, and others rely on that: initialization
code, adapters that merge, quantization, offloading. So what is handed out is remembered with a copy
until the next access. If it was written to in between, that access raises.

Reads within the linear's own forward are not remembered, so training does not pay for this. A
penalty on `linear.weight` in the loss pays for a copy; where the optimizer has moved the stack
since, nothing is compared. Nothing is remembered within torch.compile, function transforms and CUDA
graphs: `require_sound` at an optimizer's first step sees what was written before.

Note [Unfilled stacks]
`to_empty` gives a stack that was on the meta device memory with arbitrary contents. The linear's
class fills it with NaN (linear_class.py), and the first access raises if any is left.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..tensors.shards import is_sharded, local
from .expert_fusion import ExpertFusion


class _HandedOut(NamedTuple):
    """A fused tensor that someone outside of the linear holds.

    It is the very tensor, as an assignment to its `.data` shows in no other, unless it holds on to
    the graph of a running forward.
    """

    tensor: Tensor
    copy: Tensor
    stack: tuple[int, int]


class _Running(threading.local):
    linear: nn.Module | None = None


_running = _Running()
# Not attributes of the modules, for a deepcopy not to take them along.
_handed_out: weakref.WeakKeyDictionary[nn.Module, _HandedOut] = weakref.WeakKeyDictionary()


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
    require_sound(linear, name)
    fused: Tensor = parametrized()
    if _running.linear is not linear:
        _remember(parametrized, fused)
    return fused


def require_sound(linear: Any, name: str) -> None:
    """Raise a RuntimeError if a write to a fused tensor was lost, or its stack was never filled."""
    if _is_recorded():
        return
    parametrized = linear.parametrizations[name]
    fusion = parametrized[0]
    if fusion.is_unfilled:
        _require_filled(linear, name, parametrized.original)
        fusion.is_unfilled = False
    if fusion not in _handed_out:
        return
    handed_out = _handed_out.pop(fusion, None)  # another thread may have been quicker
    if handed_out is None or handed_out.stack != _identity(parametrized.original):
        return
    if not _is_capturing(handed_out.copy) and not _is_unchanged(handed_out):
        raise RuntimeError(
            f"An in-place write to {_named(linear, name)} is lost: under "
            'fuse_on="forward" it is computed from the experts at each access. Assign a tensor, '
            f"linear.{name} = tensor; initialize before wrap(); call fuse(model) before merging "
            'adapters or quantizing; or wrap with fuse_on="step", where the model is dense.'
        )


def assign(linear: Any, name: str, value: Tensor) -> None:
    """Let a parametrized tensor be what the user assigns to it.

    Raises:
        ValueError: it has another shape, or is a tensor subclass that experts cannot have.
    """
    parametrized = linear.parametrizations[name]
    fusion = parametrized[0]
    if not isinstance(fusion, ExpertFusion):
        parametrized.right_inverse(value)
        return
    is_plain = type(value.data) is Tensor or is_sharded(value)
    if not is_plain or value.shape != parametrized.original.shape[1:]:
        raise ValueError(
            f"Experts fuse to {_named(linear, name)}, got a {type(value.data).__name__} of shape "
            f"{tuple(value.shape)}. Call fuse(model) before quantizing or replacing it, or wrap "
            'with fuse_on="step".'
        )
    parametrized.right_inverse(value)
    _handed_out.pop(fusion, None)
    fusion.is_unfilled = False


def require_own_parameter(linear: Any, name: str, parameter: object) -> None:
    """Raise a TypeError for a stack or a fused tensor under a name that a linear does not have.

    Tensor parallelism registers stacks by their dotted names, pruning what the experts fuse to.
    """
    if is_sharded(parameter) and name.startswith("parametrizations."):
        raise TypeError(
            "Tensor parallelism cannot split a linear that fuses at each forward; wrap with "
            'fuse_on="step", or leave the wrapped linears out of the plan.'
        )
    if isinstance(parameter, Tensor) and not isinstance(parameter, nn.Parameter):
        raise TypeError(
            f"{name!r} is to be a parameter and is a tensor computed from experts, as when a "
            "wrapped linear is pruned. Call fuse(model) first, or wrap with "
            'fuse_on="step".'
        )


def spoil(stack: Tensor, fusion: ExpertFusion) -> None:
    """Mark a stack that has just got memory; see Note [Unfilled stacks]."""
    with torch.no_grad():
        local(stack).fill_(float("nan"))
    fusion.is_unfilled = True


def _remember(parametrized: Any, fused: Tensor) -> None:
    is_plain = type(fused) is Tensor or is_sharded(fused)
    if not is_plain or fused.is_meta or torch.func.debug_unwrap(fused) is not fused:
        return
    if _is_capturing(fused):
        return
    is_in_forward = getattr(parametrized[0].fusion_weights, "current", None) is not None
    tensor = fused.detach() if is_in_forward else fused
    _handed_out[parametrized[0]] = _HandedOut(
        tensor, local(fused).clone(), _identity(parametrized.original)
    )


def _identity(stack: Tensor) -> tuple[int, int]:
    """Which stack this is, and after which optimizer step or load."""
    return id(stack), -1 if stack.is_inference() else local(stack)._version


def _is_unchanged(handed_out: _HandedOut) -> bool:
    now, before = local(handed_out.tensor), handed_out.copy
    if (now.shape, now.dtype, now.device) != (before.shape, before.dtype, before.device):
        return False
    return torch.equal(now, before) or torch.equal(now.nan_to_num(), before.nan_to_num())


def _is_recorded() -> bool:
    """Whether what runs is compiled, exported or traced, and nothing else may be in it."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def _is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is recorded, within which nothing can be compared."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _require_filled(linear: nn.Module, name: str, stack: Tensor) -> None:
    if not stack.is_meta and local(stack).isnan().any():
        raise RuntimeError(
            f"The experts of {_named(linear, name)} hold what to_empty() left in memory. Call "
            "model.load_state_dict(state_dict), load_dense_state_dict(model, state_dict), or "
            "reset_parameters() of each module that has it."
        )


def _named(linear: Any, name: str) -> str:
    parametrized = linear.parametrizations[name]
    shape = tuple(parametrized.original.shape[1:])
    return f"the {name} of shape {shape} in {parametrized[0].fusion_weights.group!r}"
