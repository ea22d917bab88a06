"""The custom operators through which votes follow gradients, see Note [Votes follow the gradient].

Custom operators take tensors, so a tensor that holds a number names the object which they call.

Backwards are told apart by `torch._C._current_graph_task_id`, a private name; torch's own
activation checkpointing has no other means either.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

# Objects of the class Votes, whose module imports this one.
_live: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_serial_numbers = itertools.count()


def name_of(counter: Any) -> Tensor:
    """A tensor by which the operators know an object from now on, without keeping it alive.

    It requires a gradient, and gets none, so that `mark` is differentiated where neither the router
    nor x is. Its shape is (1,), as torch.compile takes a tensor of shape () for a number and traces
    all twice.
    """
    number = next(_serial_numbers)
    _live[number] = counter
    return torch.tensor([float(number)], dtype=torch.float64, device="cpu", requires_grad=True)


def current_backward() -> int | None:
    """A number for the running backward, or None outside of one."""
    identity: int = torch._C._current_graph_task_id()
    return None if identity < 0 else identity


def _free_namespace() -> str:
    """The operators' namespace: one of its own where the package is imported a second time.

    Models of the first import count through its operators, which must not be replaced.
    """
    names = itertools.chain(["exfusion_param"], (f"exfusion_param_{i}" for i in itertools.count(2)))
    return next(name for name in names if not hasattr(getattr(torch.ops, name), "mark"))


_namespace = _free_namespace()
ops: Any = getattr(torch.ops, _namespace)
"""The operators by their names."""

# A replayed CUDA graph runs no Python code, so inductor leaves these out of its graphs.
_custom_op = functools.partial(
    torch.library.custom_op, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)


@_custom_op(f"{_namespace}::mark")
def _mark(weights: Tensor, vote: float, name: Tensor) -> Tensor:
    if (counter := _live.get(int(name))) is None:
        return torch.cat([weights, weights.new_ones(1)])
    counter.follow_anchor()
    return counter.average(weights, vote)


@_custom_op(f"{_namespace}::note")
def _note(gradient: Tensor, marked: Tensor, vote: float, name: Tensor) -> Tensor:
    if (counter := _live.get(int(name))) is None:
        return gradient[:-1].clone()
    count = (marked[-1:] > 0).to(marked.dtype)
    counter.note(torch.cat([marked[:-1] * count, count]), is_for_inputs=True)
    return counter.average_gradient(gradient, marked, vote)


@_custom_op(f"{_namespace}::token")
def _token(statistics: Tensor, probe: Tensor, name: Tensor) -> Tensor:
    if (counter := _live.get(int(name))) is not None:
        counter.follow_anchor()
        counter.sums.ranks()  # those of DDP are known only while it runs the forward
    return torch.zeros_like(probe)


@_custom_op(f"{_namespace}::note_token")
def _note_token(gradient: Tensor, statistics: Tensor, name: Tensor) -> Tensor:
    if (counter := _live.get(int(name))) is not None:
        # A clone, as a compiled graph uses the memory again.
        counter.note(statistics.clone(), is_compiled=True)
    return torch.zeros_like(gradient)


@_token.register_fake
def _(statistics: Tensor, probe: Tensor, name: Tensor) -> Tensor:
    return torch.empty_like(probe)


@_note_token.register_fake
def _(gradient: Tensor, statistics: Tensor, name: Tensor) -> Tensor:
    return torch.empty_like(gradient)


@_mark.register_fake
def _(weights: Tensor, vote: float, name: Tensor) -> Tensor:
    return weights.new_empty(len(weights) + 1)


@_note.register_fake
def _(gradient: Tensor, marked: Tensor, vote: float, name: Tensor) -> Tensor:
    return gradient.new_empty(len(gradient) - 1)


def _save_for_note(ctx: Any, inputs: tuple[Tensor, float, Tensor], output: Tensor) -> None:
    ctx.vote = inputs[1]
    ctx.save_for_backward(output.detach(), inputs[2].detach())


def _note_in_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:
    # The result passes through the operator, or torch.compile would drop it as unused. The name's
    # gradient is zero and not None, which compiled autograd cannot add up over two forwards.
    marked, name = ctx.saved_tensors
    return ops.note(gradient, marked, ctx.vote, name), None, torch.zeros_like(name)


def _save_for_second_derivative(
    ctx: Any, inputs: tuple[Tensor, Tensor, float, Tensor], output: Tensor
) -> None:
    ctx.vote = inputs[2]


def _second_derivative(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.cat([gradient * ctx.vote, gradient.new_zeros(1)]), None, None, None


def _save_for_note_token(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    statistics, _, name = inputs
    ctx.save_for_backward(statistics, name.detach())


def _note_token_in_backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
    return None, ops.note_token(gradient, *ctx.saved_tensors), None


_token.register_autograd(_note_token_in_backward, setup_context=_save_for_note_token)
_mark.register_autograd(_note_in_backward, setup_context=_save_for_note)
_note.register_autograd(_second_derivative, setup_context=_save_for_second_derivative)
