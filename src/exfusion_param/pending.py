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

from .tensors.ranks import Ranks
from .tensors.shards import is_sharded, local

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
        find_ranks: a bound method that gives the ranks that train the group; it is held weakly.
    """

    def __init__(
        self, find_anchor: Callable[[], Tensor | None], find_ranks: Callable[[], Ranks]
    ) -> None:
        self.has_counted = False  # ever
        self.total: Tensor | None = None  # (N + 1,): the sum of w, and how many it sums
        self._find_anchor = weakref.WeakMethod(find_anchor)
        self._find_ranks = weakref.WeakMethod(find_ranks)
        self._all_noted: Tensor | None = None  # the total, had no gradient been reset
        self._backwards: dict[int, _Backward] = {}
        self._anchor: weakref.ref[Tensor] | None = None
        self._anchor_hooks: list[RemovableHandle] = []
        self._counts_at_once = False
        self._was_written: Tensor | None = None  # whether the anchor's gradient was not zero
        number = next(_serial_numbers)
        _live[number] = self
        # Custom operators take tensors, so this one names the object. It requires a gradient, and
        # gets none, so that `mark` is differentiated where neither the router nor x is. Of shape
        # (1,), as torch.compile takes a tensor of shape () for a number and traces all twice.
        self._name = torch.tensor(
            [float(number)], dtype=torch.float64, device="cpu", requires_grad=True
        )

    def mark(self, weights: Tensor, votes: float, counts: bool) -> Tensor:
        """The mean of `weights` over the ranks; it counts once a gradient flows back through it.

        Args:
            weights: this rank's `w`, shape (N,).
            votes: 1, or 0 if this rank has no token to route.
            counts: whether a gradient is to flow back, whatever `weights` requires.
        """
        name = self._name if counts else self._name.detach()
        marked: Tensor = torch.ops.exfusion_param.mark(weights, votes, name)
        return marked[:-1]

    def token(self, statistics: Tensor, probe: Tensor) -> Tensor:
        """Zero, shape (1,); the statistics count once a gradient flows back through it.

        Args:
            statistics: without a gradient, of one dimension.
            probe: a part of a parameter, shape (1,), which gets the gradient zero. torch.compile
                would drop a backward that no parameter gets.
        """
        zero: Tensor = torch.ops.exfusion_param.token(statistics, probe, self._name)
        return zero

    def average(self, weights: Tensor, votes: float) -> Tensor:
        """The mean of `w` over the ranks with a vote, and how many those are, shape (N + 1,)."""
        entry = self._sum_over_ranks(torch.cat([weights, weights.new_ones(1)]) * votes)
        return torch.cat([entry[:-1] / entry[-1:].clamp(min=1), entry[-1:]])

    def average_gradient(self, gradient: Tensor, marked: Tensor, votes: float) -> Tensor:
        """What `average` sends back to this rank's weights, shape (N,).

        The loss is the mean of the ranks' losses, and each rank differentiates its own, as DDP and
        FSDP have it.
        """
        summed = self._sum_over_ranks(gradient[:-1].clone())
        return votes * summed / marked[-1:].clamp(min=1)

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        find_ranks = self._find_ranks()
        return tensor if find_ranks is None else find_ranks().sum(tensor)

    def follow_anchor(self) -> None:
        """Count with the gradient of the anchor that the group has now."""
        find_anchor = self._find_anchor()
        self.follow(None if find_anchor is None else find_anchor())

    def follow(self, anchor: Tensor | None) -> None:
        """Count with the gradient of this parameter from now on; None follows none."""
        before = None if self._anchor is None else self._anchor()
        if anchor is before and anchor is not None:
            return
        if anchor is not None and before is not None and _is_gathered(anchor, before):
            self._counts_at_once = True
            return
        for hook in self._anchor_hooks:
            hook.remove()
        self._anchor, self._anchor_hooks, self._was_written = None, [], None
        if anchor is None or not anchor.is_leaf or anchor.is_meta:
            return
        self._counts_at_once = is_sharded(anchor)
        if self._counts_at_once and before is not None:  # followed a gathered one, unknowingly
            self.total = self._all_noted
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

    def note(self, entry: Tensor) -> None:
        """Note one micro-batch within a backward.

        Args:
            entry: its statistics, `w` first, and behind them 1, or 0s if it does not count.
        """
        backward = self._backward()
        backward.noted = _sum(backward.noted, entry)
        self._all_noted = _sum(self._all_noted, entry)
        if backward.has_settled or self._counts_at_once:
            self._count(backward)

    def _after_write(self, anchor: Tensor) -> None:
        """The running backward has written the anchor's gradient, so what it notes counts."""
        backward = self._backward()
        backward.has_settled = True
        if backward.noted is not None:
            self._count(backward)
        self._was_written = None if anchor.grad is None else local(anchor.grad).any()

    def _count(self, backward: _Backward) -> None:
        self.total = _sum(backward.kept, backward.noted)
        self.has_counted = True

    def _still_applied(self) -> Tensor | None:
        """The total, less what was counted for gradients that have been reset since."""
        anchor = None if self._anchor is None else self._anchor()
        if self.total is None or anchor is None:
            return None
        if self._was_written is None and (self._counts_at_once or anchor.grad is not None):
            return self.total
        if self._was_written is None or anchor.grad is None:
            return None
        # `zero_grad(set_to_none=False)` leaves zeros; to ask for them would stall a GPU.
        is_reset = self._was_written & ~local(anchor.grad).any()
        return torch.where(is_reset, 0, self.total)

    def drop_unapplied(self) -> None:
        """Forget what was counted for gradients that have been reset since."""
        self.total = self._still_applied()

    def resume(self, total: Tensor | None) -> None:
        """Go on from a total of another process, whose gradients the parameters have again."""
        self.take()
        self.follow_anchor()
        self.total = self._all_noted = total

    def take(self) -> Tensor | None:
        """The total, and forget all; None where no micro-batch was counted."""
        total, self.total, self._all_noted, self._was_written = self.total, None, None, None
        self._backwards.clear()
        return total


def mean_of(total: Tensor) -> Tensor:
    """The mean of the entries that were summed to a total, without the count behind them."""
    return total[:-1] / total[-1:].clamp(min=1)


def _is_gathered(anchor: Tensor, before: Tensor) -> bool:
    """Whether FSDP has put `anchor` in the place of `before` for a forward and backward."""
    return not anchor.is_leaf or (is_sharded(before) and not is_sharded(anchor))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


# A replayed CUDA graph runs no Python code, so inductor leaves these out of its graphs.
_custom_op = functools.partial(
    torch.library.custom_op, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)


@_custom_op("exfusion_param::mark")
def _mark(weights: Tensor, votes: float, name: Tensor) -> Tensor:
    if (pending := _live.get(int(name))) is None:
        return torch.cat([weights, weights.new_ones(1)])
    pending.follow_anchor()
    return pending.average(weights, votes)


@_custom_op("exfusion_param::note")
def _note(gradient: Tensor, marked: Tensor, votes: float, name: Tensor) -> Tensor:
    if (pending := _live.get(int(name))) is None:
        return gradient[:-1].clone()
    count = (marked[-1:] > 0).to(marked.dtype)
    pending.note(torch.cat([marked[:-1] * count, count]))
    return pending.average_gradient(gradient, marked, votes)


@_custom_op("exfusion_param::token")
def _token(statistics: Tensor, probe: Tensor, name: Tensor) -> Tensor:
    if (pending := _live.get(int(name))) is not None:
        pending.follow_anchor()
    return torch.zeros_like(probe)


@_custom_op("exfusion_param::note_token")
def _note_token(gradient: Tensor, statistics: Tensor, name: Tensor) -> Tensor:
    if (pending := _live.get(int(name))) is not None:
        pending.note(statistics.clone())  # whose memory a compiled graph uses again
    return torch.zeros_like(gradient)


@_token.register_fake
def _(statistics: Tensor, probe: Tensor, name: Tensor) -> Tensor:
    return torch.empty_like(probe)


@_note_token.register_fake
def _(gradient: Tensor, statistics: Tensor, name: Tensor) -> Tensor:
    return torch.empty_like(gradient)


@_mark.register_fake
def _(weights: Tensor, votes: float, name: Tensor) -> Tensor:
    return weights.new_empty(len(weights) + 1)


@_note.register_fake
def _(gradient: Tensor, marked: Tensor, votes: float, name: Tensor) -> Tensor:
    return gradient.new_empty(len(gradient) - 1)


def _save_for_note(ctx: Any, inputs: tuple[Tensor, float, Tensor], output: Tensor) -> None:
    ctx.votes = inputs[1]
    ctx.save_for_backward(output.detach(), inputs[2].detach())


def _note_in_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:
    # The result passes through the operator, or torch.compile would drop it as unused. The name's
    # gradient is zero and not None, which compiled autograd cannot add up over two forwards.
    marked, name = ctx.saved_tensors
    note = torch.ops.exfusion_param.note
    return note(gradient, marked, ctx.votes, name), None, torch.zeros_like(name)


def _save_for_second_derivative(
    ctx: Any, inputs: tuple[Tensor, Tensor, float, Tensor], output: Tensor
) -> None:
    ctx.votes = inputs[2]


def _second_derivative(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.cat([gradient * ctx.votes, gradient.new_zeros(1)]), None, None, None


def _save_for_note_token(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    statistics, _, name = inputs
    ctx.save_for_backward(statistics, name.detach())


def _note_token_in_backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
    return None, torch.ops.exfusion_param.note_token(gradient, *ctx.saved_tensors), None


_token.register_autograd(_note_token_in_backward, setup_context=_save_for_note_token)
_mark.register_autograd(_note_in_backward, setup_context=_save_for_note)
_note.register_autograd(_second_derivative, setup_context=_save_for_second_derivative)
