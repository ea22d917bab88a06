"""Which micro-batches count when the memory bank moves: those whose gradient the step applies.

Note [Statistics follow the gradient]
The bank moves once per optimizer step, by the mean of the current fusion weights `w` of all
micro-batches. A training loop may run forwards that no step applies: a forward without a backward,
activation checkpointing's second forward, a backward that fails or whose gradient goes elsewhere
(`autograd.grad`) or is thrown away because a GradScaler skipped the step. So `w` is not counted
when it is computed but with the gradient that flows back through it:

- `mark` is an identity on `w` whose backward notes `w`. Under activation checkpointing exactly one
  of the two forwards is differentiated, reentrant or not.
- What one backward has noted counts when that backward writes the gradient of the anchor, one
  parameter of the group. If the anchor's gradient was reset since the last backward, what was
  counted before is dropped: it is None now, or it is zero and was not.
- `mark` and its backward are custom operators, opaque to torch.compile: the graph calls them, and
  the Python code in them runs each time, in eager and compiled mode alike.

Backwards are told apart by `torch._C._current_graph_task_id`, a private name; torch's own
activation checkpointing has no other means either.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

_live: weakref.WeakValueDictionary[int, PendingMean] = weakref.WeakValueDictionary()
_serial_numbers = itertools.count()


@dataclasses.dataclass
class _Backward:
    """What one backward has noted.

    Args:
        kept: of what was counted before it, shape (N + 1,), or None.
        noted: the sum of its w and how many it sums, shape (N + 1,), or None.
        has_settled: whether it has written the anchor's gradient.
    """

    kept: Tensor | None
    noted: Tensor | None = None
    has_settled: bool = False


class PendingMean:
    """The mean of `w`, shape (N,), over the micro-batches that wait for the optimizer's step.

    Args:
        find_anchor: a bound method that gives a trainable parameter of the group, or None; it is
            held weakly.
    """

    def __init__(self, find_anchor: Callable[[], Tensor | None]) -> None:
        self.has_counted = False  # ever
        self.find_anchor = weakref.WeakMethod(find_anchor)
        self._total: Tensor | None = None  # (N + 1,): the sum of w, and how many it sums
        self._backwards: dict[int, _Backward] = {}
        self._anchor: weakref.ref[Tensor] | None = None
        self._anchor_hooks: list[RemovableHandle] = []
        self._was_written: Tensor | None = None  # whether the anchor's gradient was not zero
        number = next(_serial_numbers)
        _live[number] = self
        # Custom operators take tensors, so this one names the object. It requires a gradient, and
        # gets none, so that `mark` is differentiated where neither the router nor x is. Of shape
        # (1,), as torch.compile takes a tensor of shape () for a number and traces all twice.
        self._name = torch.tensor(
            [float(number)], dtype=torch.float64, device="cpu", requires_grad=True
        )

    def mark(self, weights: Tensor) -> Tensor:
        """`weights` unchanged; they count once a gradient flows back through the result."""
        marked: Tensor = torch.ops.exfusion_param.mark(weights, self._name)
        return marked

    def token(self, statistics: Tensor, probe: Tensor) -> Tensor:
        """Zero, shape (1,); the statistics count once a gradient flows back through it.

        Args:
            statistics: without a gradient, of one dimension.
            probe: a part of a parameter, shape (1,), which gets the gradient zero. torch.compile
                would drop a backward that no parameter gets.
        """
        zero: Tensor = torch.ops.exfusion_param.token(statistics, probe, self._name)
        return zero

    def follow_anchor(self) -> None:
        """Count with the gradient of the anchor that the group has now."""
        find_anchor = self.find_anchor()
        self.follow(None if find_anchor is None else find_anchor())

    def follow(self, anchor: Tensor | None) -> None:
        """Count with the gradient of this leaf from now on; None follows none."""
        if anchor is not None and self._anchor is not None and anchor is self._anchor():
            return
        for hook in self._anchor_hooks:
            hook.remove()
        self._anchor, self._anchor_hooks, self._was_written = None, [], None
        if anchor is not None and anchor.is_leaf:
            # A strong reference would be a cycle that gc cannot see, as it runs through the hooks.
            self._anchor = weakref.ref(anchor)
            self._anchor_hooks = [
                anchor.register_hook(self._before_write),
                anchor.register_post_accumulate_grad_hook(self._after_write),
            ]

    def _before_write(self, gradient: Tensor) -> None:
        self._backward()

    def _backward(self) -> _Backward:
        """The running backward; to be called before it writes the anchor's gradient."""
        identity = torch._C._current_graph_task_id()
        if identity not in self._backwards:
            unsettled = {k: v for k, v in self._backwards.items() if not v.has_settled}
            self._backwards = unsettled | {identity: _Backward(self._still_applied())}
        return self._backwards[identity]

    def note(self, weights: Tensor) -> None:
        """Note one micro-batch's fusion weights, shape (N,), within a backward."""
        backward = self._backward()
        entry = torch.cat([weights, weights.new_ones(1)])
        backward.noted = _sum(backward.noted, entry)
        if backward.has_settled:
            self._count(backward)

    def _after_write(self, anchor: Tensor) -> None:
        """The running backward has written the anchor's gradient, so what it notes counts."""
        backward = self._backward()
        backward.has_settled = True
        if backward.noted is not None:
            self._count(backward)
        self._was_written = None if anchor.grad is None else anchor.grad.any()

    def _count(self, backward: _Backward) -> None:
        self._total = _sum(backward.kept, backward.noted)
        self.has_counted = True

    def _still_applied(self) -> Tensor | None:
        """The total, less what was counted for gradients that have been reset since."""
        anchor = None if self._anchor is None else self._anchor()
        if self._total is None or anchor is None or anchor.grad is None:
            return None
        if self._was_written is None:
            return self._total
        # `zero_grad(set_to_none=False)` leaves zeros; to ask for them would stall a GPU.
        is_reset = self._was_written & ~anchor.grad.any()
        return torch.where(is_reset, 0, self._total)

    def mean(self) -> Tensor | None:
        """The mean, shape (N,); None where no micro-batch was counted."""
        return None if self._total is None else self._total[:-1] / self._total[-1]

    def take(self) -> Tensor | None:
        """The mean, and forget all."""
        mean, self._total = self.mean(), None
        self._backwards.clear()
        return mean


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


# A replayed CUDA graph runs no Python code, so inductor leaves these out of its graphs.
_custom_op = functools.partial(
    torch.library.custom_op, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)


@_custom_op("exfusion_param::mark")
def _mark(weights: Tensor, name: Tensor) -> Tensor:
    if (pending := _live.get(int(name))) is not None:
        pending.follow_anchor()
    return weights.clone()


@_custom_op("exfusion_param::note")
def _note(gradient: Tensor, weights: Tensor, name: Tensor) -> Tensor:
    if (pending := _live.get(int(name))) is not None:
        pending.note(weights)
    return gradient.clone()


@_custom_op("exfusion_param::token")
def _token(statistics: Tensor, probe: Tensor, name: Tensor) -> Tensor:
    if (pending := _live.get(int(name))) is not None:
        pending.follow_anchor()
    return torch.zeros_like(probe)


@_custom_op("exfusion_param::note_token")
def _note_token(gradient: Tensor, statistics: Tensor, name: Tensor) -> Tensor:
    if (pending := _live.get(int(name))) is not None:
        pending.note(statistics)
    return torch.zeros_like(gradient)


@_token.register_fake
def _(statistics: Tensor, probe: Tensor, name: Tensor) -> Tensor:
    return torch.empty_like(probe)


@_note_token.register_fake
def _(gradient: Tensor, statistics: Tensor, name: Tensor) -> Tensor:
    return torch.empty_like(gradient)


@_mark.register_fake
def _(weights: Tensor, name: Tensor) -> Tensor:
    return torch.empty_like(weights)


@_note.register_fake
def _(gradient: Tensor, weights: Tensor, name: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _save_for_note(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*(tensor.detach() for tensor in inputs))


def _note_in_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    # The result passes through the operator, or torch.compile would drop it as unused. The name's
    # gradient is zero and not None, which compiled autograd cannot add up over two forwards.
    weights, name = ctx.saved_tensors
    return torch.ops.exfusion_param.note(gradient, weights, name), torch.zeros_like(name)


def _second_derivative(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return gradient, None, None


def _save_for_note_token(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    statistics, _, name = inputs
    ctx.save_for_backward(statistics, name.detach())


def _note_token_in_backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
    return None, torch.ops.exfusion_param.note_token(gradient, *ctx.saved_tensors), None


_token.register_autograd(_note_token_in_backward, setup_context=_save_for_note_token)
_mark.register_autograd(_note_in_backward, setup_context=_save_for_note)
_note.register_autograd(_second_derivative)
