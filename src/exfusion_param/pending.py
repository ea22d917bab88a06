"""Which micro-batches count when the memory bank moves: those whose gradient the step applies.

Note [Statistics follow the gradient]
The bank moves once per optimizer step, by the mean of the current fusion weights `w` of all
micro-batches. A training loop may run forwards that no step applies: a forward without a backward,
activation checkpointing's second forward, a micro-batch whose gradient is thrown away because a
GradScaler skipped the step. So `w` is not counted when it is computed but when the gradient flows
back through it, and what was counted is dropped when the gradient it belongs to has been dropped.

- `mark` is an identity on `w` whose backward counts `w`. Under activation checkpointing exactly one
  of the two forwards is differentiated, reentrant or not.
- `mark` and its backward are custom operators, opaque to torch.compile: the graph calls them, and
  the Python code in them runs each time, in eager and compiled mode alike.
- One parameter of the group, the anchor, tells whether gradients were reset since the last
  backward: its `.grad` is then None, or zero. `_settled` tells that from a gradient that the
  running backward has yet to write.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

_live: weakref.WeakValueDictionary[int, PendingMean] = weakref.WeakValueDictionary()
_serial_numbers = itertools.count()


class PendingMean:
    """The mean of `w`, shape (N,), over the micro-batches that wait for the optimizer's step."""

    def __init__(self) -> None:
        self._total: Tensor | None = None  # (N + 1,): the sum of w, and how many it sums
        self._settled = False  # the backward that counted last has written the anchor's gradient
        self._anchor: Tensor | None = None
        self._anchor_hook: RemovableHandle | None = None
        number = next(_serial_numbers)
        _live[number] = self
        # Custom operators take tensors, so this one names the object. It requires a gradient, and
        # gets none, so that `mark` is differentiated where neither the router nor x is.
        self._name = torch.tensor(
            float(number), dtype=torch.float64, device="cpu", requires_grad=True
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PendingMean:
        """An empty one: a copied model has no gradients either."""
        return PendingMean()

    def mark(self, weights: Tensor) -> Tensor:
        """`weights` unchanged; they count once a gradient flows back through the result."""
        marked: Tensor = torch.ops.exfusion_param.mark(weights, self._name)
        return marked

    def follow(self, anchor: Tensor | None) -> None:
        """Tell a dropped gradient by this parameter from now on; None follows none."""
        if anchor is self._anchor:
            return
        if self._anchor_hook is not None:
            self._anchor_hook.remove()
        self._anchor, self._anchor_hook = anchor, None
        if anchor is not None:
            self._anchor_hook = anchor.register_post_accumulate_grad_hook(self._settle)

    def _settle(self, anchor: Tensor) -> None:
        self._settled = True

    def count(self, weights: Tensor) -> None:
        """Count one micro-batch's fusion weights, shape (N,)."""
        entry = torch.cat([weights, weights.new_ones(1)])
        kept = self._still_applied() if self._settled else self._total
        self._total = entry if kept is None else kept + entry
        self._settled = False

    def _still_applied(self) -> Tensor | None:
        """The total, less what was counted for gradients that have been reset since."""
        gradient = None if self._anchor is None else self._anchor.grad
        if gradient is None or self._total is None:
            return None
        # `zero_grad(set_to_none=False)` leaves zeros; to ask for them would stall a GPU.
        return torch.where(gradient.any(), self._total, 0)

    def take(self) -> Tensor | None:
        """The mean, shape (N,), and forget it; None where no micro-batch was counted."""
        total, self._total = self._total, None
        return None if total is None else total[:-1] / total[-1]


@torch.library.custom_op("exfusion_param::mark", mutates_args=())
def _mark(weights: Tensor, name: Tensor) -> Tensor:
    return weights.clone()


@torch.library.custom_op("exfusion_param::count", mutates_args=())
def _count(gradient: Tensor, weights: Tensor, name: Tensor) -> Tensor:
    if (pending := _live.get(int(name))) is not None:
        pending.count(weights)
    return gradient.clone()


@_mark.register_fake
def _(weights: Tensor, name: Tensor) -> Tensor:
    return torch.empty_like(weights)


@_count.register_fake
def _(gradient: Tensor, weights: Tensor, name: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _save_for_count(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*(tensor.detach() for tensor in inputs))


def _count_in_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    # The result passes through the operator, or torch.compile would drop it as unused.
    return torch.ops.exfusion_param.count(gradient, *ctx.saved_tensors), None


_mark.register_autograd(_count_in_backward, setup_context=_save_for_count)
