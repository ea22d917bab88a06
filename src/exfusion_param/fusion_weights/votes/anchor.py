"""The parameter of an FFN group whose gradient tells which micro-batches a step applies.

FSDP2 puts a gathered parameter in the place of a sharded one for a forward and its backward. Then
autograd writes to the gathered one, which has hooks of its own, and FSDP2 reduces its gradient into
the sharded one, where `zero_grad` shows. Between the two, as with
`set_requires_gradient_sync(False)`, neither may have a gradient; nothing was reset then.

A backward may compute the anchor's gradient and leave it to the user's code to add it up:
`autograd.grad`, and pipelines whose schedule splits input and weight gradients (zero bubble).
Whether that happened shows at the next backward, or at the step.

No tensor is held weakly, as torch's `swap_tensors`, which moves DTensors, would refuse it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ...tensors.fsdp_groups import is_flattened, is_resharded_after_forward
from ...tensors.shards import has_nonzero, is_sharded, local, sample
from .custom_ops import current_backward

SIZE = 1024
"""Numbers in a sample of a gradient, at least."""
_FOLLOWED = "_exfusion_followed"
"""The attribute of a parameter that has our hooks."""
_WRITTEN = "_exfusion_written"
"""The attribute of a gradient that autograd wrote: which write of an anchor's it was."""


class Anchor:
    """Calls back around each write to the gradient of a group's anchor.

    Args:
        find: a bound method that gives a trainable parameter of the group, or None; it is held
            weakly.
        before_write: called in a backward with the anchor's new gradient.
        after_write: called with the anchor once its `.grad` has it.
        before_switch: called before another parameter becomes the anchor.
    """

    def __init__(
        self,
        find: Callable[[], Tensor | None],
        before_write: Callable[[Tensor], None],
        after_write: Callable[[Tensor], None],
        before_switch: Callable[[], None],
    ) -> None:
        self.counts_at_once = False
        """FSDP1 has put views of flat parameters in place, to which autograd writes nothing."""
        self._find = weakref.WeakMethod(find)
        self._before_write = before_write
        self._after_write = after_write
        self._before_switch = before_switch
        self._parameter: Tensor | None = None
        self._gathered: Tensor | None = None  # in its place
        self._hooks: list[RemovableHandle] = []
        self._was_written: Tensor | None = None  # whether the gradient was not zero
        self._is_held_back = False  # by FSDP2, which has not reduced it yet
        self._is_new = False  # it took over in the middle of an accumulation, without a gradient
        self._written: object = None  # marks the gradient that autograd wrote last
        self._sample: tuple[Tensor, int] | None = None  # some of its numbers then, and its version
        self._left_at: list[tuple[int, int]] | None = None  # by a backward that did not write it
        self.is_by_hand = False
        """What a backward computed was added up by the user's code."""

    def refresh(self) -> None:
        """Follow the anchor that the group has now; the last one while all are frozen."""
        if (find := self._find()) is not None and (parameter := find()) is not None:
            self.follow(parameter)

    def follow(self, parameter: Tensor | None) -> None:
        """Follow this parameter from now on; None follows none."""
        if self._parameter is not None and not hasattr(self._parameter, _FOLLOWED):
            self._leave()  # `swap_tensors` has moved it
        before = self._parameter
        if parameter is not None and (parameter is before or parameter is self._gathered):
            return
        if parameter is not None and before is not None:
            if not parameter.is_leaf and not is_flattened(before):
                return  # `functional_call` has put it there, as MAML does
            if _is_gathered(parameter, before):
                self._gathered = parameter
                self.counts_at_once = not parameter.is_leaf
                self._hook(parameter)
                return
            if _is_gathered(before, parameter):  # it was gathered when it was followed first
                self._parameter, self._gathered = parameter, before
                self._written = None  # FSDP2 writes the sharded one's
                setattr(parameter, _FOLLOWED, True)
                return
        if before is not None:
            self._before_switch()
            self._is_new = parameter is not None
        self._leave()
        if parameter is not None and parameter.is_leaf and not parameter.is_meta:
            self._parameter = parameter
            self._hook(parameter)

    def _leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._parameter, self._gathered, self._hooks = None, None, []
        self._was_written, self._written, self._left_at = None, None, None
        self._is_held_back = self.counts_at_once = self.is_by_hand = False

    def _hook(self, parameter: Tensor) -> None:
        if not parameter.is_leaf:
            return
        held_weakly = weakref.WeakMethod(self._wrote)  # garbage collection sees no cycle there

        def wrote(parameter: Tensor) -> None:
            if (call := held_weakly()) is not None:
                call(parameter)

        _drop_cut_off_hooks(parameter)
        setattr(parameter, _FOLLOWED, True)
        self._hooks += [
            parameter.register_hook(self._computed),
            parameter.register_post_accumulate_grad_hook(wrote),
        ]

    def _computed(self, gradient: Tensor) -> None:
        self._look_for_hand()
        self._left_at = self._gradients()
        self._before_write(gradient)

    def _gradients(self) -> list[tuple[int, int]]:
        """Identity and version of what the anchor and a gathered one in its place have now."""
        parameters = [self._parameter, self._gathered]
        found = [tensor.grad for tensor in parameters if tensor is not None and tensor.is_leaf]
        return [(id(grad), local(grad)._version) for grad in found if grad is not None]

    def _look_for_hand(self) -> None:
        """Whether the gradient that a backward computed has been added up since."""
        now = self._gradients()
        if self._left_at is not None and now and now != self._left_at:
            self.is_by_hand = True
        self._left_at = None

    def _wrote(self, parameter: Tensor) -> None:
        self._left_at = None
        self._after_write(parameter)
        self._note_gradient(parameter)
        self._is_new = False
        if current_backward() is None:  # a pipeline has FSDP2 reduce the gradients after it
            self._end_backward()
            return
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        """FSDP2 has reduced the gradient, or keeps it until a later backward."""
        self.refresh()
        if self._parameter is not None:
            self._is_held_back = self._parameter.grad is None
            if not self._is_written(self._parameter.grad):
                self._note_gradient(self._parameter)

    def _note_gradient(self, parameter: Tensor) -> None:
        self._was_written = self._written = self._sample = None
        if (gradient := parameter.grad) is None:
            return
        self._was_written, self._written = has_nonzero(gradient), object()
        setattr(gradient, _WRITTEN, self._written)
        if not is_sharded(gradient):
            self._sample = sample(gradient, SIZE).float(), gradient._version

    def _is_written(self, gradient: Tensor | None) -> bool:
        """Whether this is the gradient that autograd wrote last."""
        return self._written is not None and getattr(gradient, _WRITTEN, None) is self._written

    def forget_write(self) -> None:
        """A step has applied the gradient."""
        self._was_written = self._left_at = None
        self._is_new = self.is_by_hand = False

    def still_applied(self, total: Tensor | None) -> Tensor | None:
        """What was counted for the gradient as it was last written, if it has not been reset."""
        if total is None or self._parameter is None:
            return None
        if self._is_new or self._is_held_back or self.counts_at_once:
            return total
        if (gradient := self._parameter.grad) is None or self._was_written is None:
            return None if gradient is None else total
        # `zero_grad(set_to_none=False)` leaves zeros; to ask for them would stall a GPU.
        is_reset = self._was_written & ~has_nonzero(gradient)
        return torch.where(is_reset.to(total.device), 0, total)

    def is_resharded(self) -> bool:
        """Whether FSDP2 takes it away between a forward and its backward."""
        return self._parameter is not None and is_resharded_after_forward(self._parameter)

    def composed(self, is_counted: bool) -> Tensor | None:
        """The gradient, if not autograd wrote it but the user's code, out of those of backwards.

        DDP puts a view of its buckets in the place of what autograd wrote.

        Args:
            is_counted: whether anything was counted for a gradient that autograd wrote.
        """
        gradient = None if self._parameter is None else self._parameter.grad
        self._look_for_hand()
        if self.is_by_hand:
            return gradient
        if gradient is None or self.counts_at_once or gradient._is_view():
            return None
        if self._written is None:  # by a parameter that was the anchor before, if anything counted
            return None if is_counted else gradient
        return None if self._is_written(gradient) else gradient

    def rewritten(self) -> Tensor | None:
        """Whether what autograd wrote points elsewhere now, a boolean of shape (); None if not.

        Clipping and unscaling write in place as well, and leave the direction.
        """
        gradient = None if self._parameter is None else self._parameter.grad
        if gradient is None or self._sample is None or not self._is_written(gradient):
            return None
        before, version = self._sample
        if gradient._version == version or gradient._is_view():
            return None
        now = sample(gradient, SIZE).float()
        product, norms = now @ before, now.norm() * before.norm()
        return (product < (1 - 1e-3) * norms) & (norms > 0)


def _drop_cut_off_hooks(parameter: Any) -> None:
    """Hooks are not called in an empty dict that `swap_tensors` has left."""
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if not getattr(parameter, hooks):
            setattr(parameter, hooks, None)


def _is_gathered(parameter: Tensor, before: Tensor) -> bool:
    """Whether FSDP has put `parameter` in the place of `before` for a forward and backward."""
    if not parameter.is_leaf:
        return True
    dims, dims_before = [p.device_mesh.ndim if is_sharded(p) else 0 for p in (parameter, before)]
    return parameter.shape == before.shape and dims < dims_before
