"""Tracks which micro-batches count when a memory bank moves: those whose gradient a step applies.

Note [Votes follow the gradient]
The bank moves once per optimizer step, by the mean of the current fusion weights `w` of all
micro-batches; a micro-batch's `w` is its vote. A training loop may run forwards that no step
applies: a forward without a backward, activation checkpointing's second forward, a backward that
fails or whose gradient goes elsewhere (`autograd.grad`) or is thrown away because a GradScaler
skipped the step. So `w` is not counted when it is computed but with the gradient that flows back
through it:

- `mark` is an identity on `w` whose backward notes `w`. Under activation checkpointing exactly one
  of the two forwards is differentiated, reentrant or not.
- What one backward has noted counts when that backward writes the gradient of the anchor, one
  parameter of the group (anchor.py). If the anchor's gradient was reset since the last backward,
  what was counted before is dropped: it is None now, or it is zero and was not.
- A backward within a backward (reversible networks, adjoint methods) may leave it to an
  `autograd.Function` to hand the anchor's gradient on. It counts when the outer one writes.
- Code that composes gradients by hand (PCGrad, gradients that are stashed and summed, pipelines
  with a zero-bubble schedule) leaves in the anchor's `.grad` what autograd did not write there, or
  writes another direction into what it did. Then all that was noted since the last step counts.
- `mark` and its backward are custom operators, opaque to torch.compile (custom_ops.py): the graph
  calls them, and the Python code in them runs each time, in eager and compiled mode alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ...tensors.ranks import Ranks
from .anchor import Anchor
from .custom_ops import current_backward, name_of, ops
from .ordered_sums import OrderedSums
from .refusals import lost_gradients, split_backwards


@dataclasses.dataclass
class _Backward:
    """The votes that one backward has noted but not counted yet.

    Args:
        noted: the sum of its w and how many it sums, shape (N + 1,), or None.
        writes: whether it is about to write the anchor's gradient, or has.
        has_written: whether it has written the anchor's gradient.
        is_for_inputs: whether it noted on the way to the FFN's input, as under "forward".
        uncertain: like noted, by compiled code, which notes again when it writes.
    """

    noted: Tensor | None = None
    uncertain: Tensor | None = None
    writes: bool = False
    has_written: bool = False
    is_for_inputs: bool = False

    @property
    def is_split(self) -> bool:
        """Whether it has left the anchor's gradient to another backward."""
        return self.is_for_inputs and not self.writes


class Votes:
    """The mean of `w`, shape (N,), over the micro-batches that wait for the optimizer's step.

    Args:
        find_anchor: a bound method that gives a trainable parameter of the group, or None; it is
            held weakly.
        find_ranks: as for `OrderedSums`.
        name: of the group, alike on all ranks.
    """

    def __init__(
        self,
        find_anchor: Callable[[], Tensor | None],
        find_ranks: Callable[[], Ranks],
        name: str,
    ) -> None:
        self.has_counted = False  # ever
        self.total: Tensor | None = None  # (N + 1,): the sum of w, and how many it sums
        self.sums = OrderedSums(name, find_ranks)
        self._all_noted: Tensor | None = None  # the total, had no gradient been reset
        self._is_split = False  # a backward since the last step was
        self._backwards: dict[int | None, _Backward] = {}
        self._anchor = Anchor(
            find_anchor, self._before_write, self._after_write, self.drop_unapplied
        )
        self._group = name
        self._name = name_of(self)

    def mark(self, weights: Tensor, vote: float, counts: bool) -> Tensor:
        """The mean of `weights` over the ranks; it counts once a gradient flows back through it.

        Args:
            weights: this rank's `w`, shape (N,).
            vote: 1, or 0 if this rank has no token to route.
            counts: whether a gradient is to flow back, whatever `weights` requires.
        """
        name = self._name if counts else self._name.detach()
        marked: Tensor = ops.mark(weights, vote, name)
        return marked[:-1]

    def token(self, statistics: Tensor, probe: Tensor) -> Tensor:
        """Zero, shape (1,); the statistics count once a gradient flows back through it.

        Args:
            statistics: without a gradient, of one dimension.
            probe: a part of a parameter, shape (1,), which gets the gradient zero. torch.compile
                would drop a backward that no parameter gets.
        """
        zero: Tensor = ops.token(statistics, probe, self._name)
        return zero

    def average(self, weights: Tensor, vote: float) -> Tensor:
        """The mean of `w` over the ranks with a vote, and how many those are, shape (N + 1,)."""
        entry = self.sums.sum(torch.cat([weights, weights.new_ones(1)]) * vote, "forward")
        return torch.cat([entry[:-1] / entry[-1:].clamp(min=1), entry[-1:]])

    def average_gradient(self, gradient: Tensor, marked: Tensor, vote: float) -> Tensor:
        """What `average` sends back to this rank's weights, shape (N,).

        The loss is the mean of the ranks' losses, and each rank differentiates its own, as DDP and
        FSDP have it.
        """
        summed = self.sums.sum(gradient, "backward")[:-1]
        return vote * summed / marked[-1:].clamp(min=1)

    def follow_anchor(self) -> None:
        """Count with the gradient of the anchor that the group has now."""
        self._anchor.refresh()

    def follow(self, anchor: Tensor | None) -> None:
        """Count with the gradient of this parameter from now on; None follows none."""
        self._anchor.follow(anchor)

    def _before_write(self, gradient: Tensor) -> None:
        backward = self._backward()
        backward.writes = True
        self._all_noted = _sum(self._all_noted, backward.uncertain)
        backward.uncertain = None

    def _backward(self) -> _Backward:
        """The running backward; to be called before it writes the anchor's gradient."""
        identity = current_backward()
        if identity not in self._backwards:
            # Another one that has not written yet may be running around this one: reentrant
            # checkpointing runs backwards within a backward.
            waiting = {k: v for k, v in self._backwards.items() if not v.has_written}
            self._is_split |= any(other.is_split for other in waiting.values())
            self._backwards = waiting | {identity: _Backward()}
            self.drop_unapplied()
        return self._backwards[identity]

    def note(
        self, entry: Tensor, *, is_for_inputs: bool = False, is_compiled: bool = False
    ) -> None:
        """Note one micro-batch within a backward.

        Args:
            entry: its statistics, `w` first, and behind them 1, or 0s if it does not count.
            is_for_inputs: whether a backward that computes no parameter's gradient does it too.
            is_compiled: whether that one does it, and later the one that computes it again.
        """
        backward = self._backward()
        backward.is_for_inputs |= is_for_inputs
        backward.noted = _sum(backward.noted, entry)
        if is_compiled and not backward.writes:
            backward.uncertain = _sum(backward.uncertain, entry)
        else:
            self._all_noted = _sum(self._all_noted, entry)
        if backward.has_written or self._anchor.counts_at_once:
            self._count(backward)

    def _after_write(self, anchor: Tensor) -> None:
        """What this backward notes counts, and what those within it did that computed a part."""
        backward = self._backward()
        backward.has_written = True
        self._count(backward)
        if len(self._backwards) == 1:
            return
        running = current_backward()
        for identity, inner in self._backwards.items():
            if running is not None and inner.writes and (identity or 0) > running:
                self._count(inner)  # it began within this one

    def _count(self, backward: _Backward) -> None:
        if backward.noted is not None:
            self.total, backward.noted = _sum(self.total, backward.noted), None
            self.has_counted = True

    def drop_unapplied(self) -> None:
        """Forget what was counted for gradients that have been reset since."""
        self.total = self._anchor.still_applied(self.total)

    @property
    def has_waiting(self) -> bool:
        """Whether backwards since the last step have noted anything."""
        return self._all_noted is not None

    def before_step(self, has_gradient: Callable[[], Tensor]) -> None:
        """Have in the total what the step applies, whose gradients `has_gradient` finds nonzero."""
        self.follow_anchor()  # FSDP2 may have had a gathered one in its place
        running = self._backwards.get(current_backward())
        if running is not None and running.writes:  # the step is that of a hook on the anchor
            self._count(running)
        else:
            self.drop_unapplied()
        gradient = self._anchor.composed(self.total is not None)
        if gradient is not None and self._all_noted is not None:
            if self._is_split or any(other.is_split for other in self._backwards.values()):
                raise split_backwards(self._group)
            if self._anchor.is_by_hand and self._anchor.is_resharded():
                raise lost_gradients(self._group)
            self.total = torch.where(has_gradient(), self._all_noted, 0)
            self.has_counted = True
        is_rewritten = self._anchor.rewritten()
        if is_rewritten is not None and self.total is not None and self._all_noted is not None:
            self.total = torch.where(is_rewritten, self._all_noted, self.total)

    def resume(self, total: Tensor | None) -> None:
        """Go on from a total of another process, whose gradients the parameters have again."""
        self.take()
        self.follow_anchor()
        self.total = self._all_noted = total

    def take(self) -> Tensor | None:
        """The total, and forget all; None where no micro-batch was counted.

        A step within a backward leaves what that backward has noted and may still count.
        """
        total, self.total, self._all_noted = self.total, None, None
        self._is_split = False
        self._anchor.forget_write()
        if current_backward() is None:
            self._backwards.clear()
        for backward in self._backwards.values():
            self._all_noted = _sum(self._all_noted, backward.noted)
        return total


def mean_of(total: Tensor) -> Tensor:
    """The mean of the entries that were summed to a total, without the count behind them."""
    return total[:-1] / total[-1:].clamp(min=1)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
