"""The parameter of an FFN group whose gradient tells which micro-batches a step applies.

FSDP2 puts a gathered parameter in the place of a sharded one for a forward and its backward, so the
anchor is looked up again at each use. It is held weakly: a strong reference would be a cycle that
the garbage collector cannot see, as it runs through the parameter's hooks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ...tensors.shards import is_sharded, local


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
        self.is_sharded = False
        """Autograd writes to gathered parameters, so writes to this one come late or never."""
        self._find = weakref.WeakMethod(find)
        self._before_write = before_write
        self._after_write = after_write
        self._before_switch = before_switch
        self._parameter: weakref.ref[Tensor] | None = None
        self._hooks: list[RemovableHandle] = []
        self._was_written: Tensor | None = None  # whether the gradient was not zero
        self._is_new = False  # it took over in the middle of an accumulation, without a gradient
        self._written: weakref.ref[Tensor] | None = None  # the gradient that autograd wrote last
        self._sample: tuple[Tensor, int] | None = None  # some of its numbers then, and its version

    def refresh(self) -> bool:
        """Follow the anchor that the group has now; returns as `follow` does."""
        find = self._find()
        return self.follow(None if find is None else find())

    def follow(self, parameter: Tensor | None) -> bool:
        """Follow this parameter from now on; None follows none.

        Returns:
            Whether a gathered parameter has been followed so far as if it were the group's own.
        """
        before = None if self._parameter is None else self._parameter()
        if parameter is before and parameter is not None:
            return False
        if parameter is not None and before is not None and _is_gathered(parameter, before):
            self.is_sharded = True
            return False
        if parameter is not None and before is not None:
            self._before_switch()
            self._is_new = True
        for hook in self._hooks:
            hook.remove()
        self._parameter, self._hooks, self._was_written, self._written = None, [], None, None
        if parameter is None or not parameter.is_leaf or parameter.is_meta:
            return False
        self.is_sharded = is_sharded(parameter)
        self._parameter = weakref.ref(parameter)
        self._hooks = [
            parameter.register_hook(self._before_write),
            parameter.register_post_accumulate_grad_hook(self._wrote),
        ]
        return self.is_sharded and before is not None

    def _wrote(self, parameter: Tensor) -> None:
        self._after_write(parameter)
        gradient = parameter.grad
        self._was_written = None if gradient is None else local(gradient).any()
        self._written = None if gradient is None else weakref.ref(gradient)
        self._sample = None if gradient is None else (_sample_of(gradient), gradient._version)
        self._is_new = False

    def forget_write(self) -> None:
        """A step has applied the gradient."""
        self._was_written = None
        self._is_new = False

    def still_applied(self, total: Tensor | None) -> Tensor | None:
        """What was counted for the gradient as it was last written, if it has not been reset."""
        parameter = None if self._parameter is None else self._parameter()
        if total is None or parameter is None:
            return None
        if self._is_new:
            return total
        if self._was_written is None and (self.is_sharded or parameter.grad is not None):
            return total
        if self._was_written is None or parameter.grad is None:
            return None
        # `zero_grad(set_to_none=False)` leaves zeros; to ask for them would stall a GPU.
        is_reset = self._was_written & ~local(parameter.grad).any()
        return torch.where(is_reset, 0, total)

    def composed(self, is_counted: bool) -> Tensor | None:
        """The gradient, if not autograd wrote it but the user's code, out of those of backwards.

        DDP puts a view of its buckets in the place of what autograd wrote.

        Args:
            is_counted: whether anything was counted for a gradient that autograd wrote.
        """
        parameter = None if self._parameter is None else self._parameter()
        gradient = None if parameter is None else parameter.grad
        if gradient is None or self.is_sharded or gradient._is_view():
            return None
        if self._written is None:  # by a parameter that was the anchor before, if anything counted
            return None if is_counted else gradient
        return None if self._written() is gradient else gradient

    def rewritten(self) -> Tensor | None:
        """Whether what autograd wrote points elsewhere now, a boolean of shape (); None if not.

        Clipping and unscaling write in place as well, and leave the direction.
        """
        gradient = None if self._written is None else self._written()
        if gradient is None or self._sample is None or self.is_sharded or gradient._is_view():
            return None
        before, version = self._sample
        if gradient._version == version:
            return None
        now = _sample_of(gradient)
        product, norms = now @ before, now.norm() * before.norm()
        return (product < (1 - 1e-3) * norms) & (norms > 0)


def _sample_of(gradient: Tensor) -> Tensor:
    """Up to about a thousand numbers of a gradient, in float32, one dimension."""
    numbers = gradient.detach().flatten()
    sample = numbers[:: max(1, len(numbers) // 1024)].float()
    return sample.clone() if sample.data_ptr() == numbers.data_ptr() else sample


def _is_gathered(parameter: Tensor, before: Tensor) -> bool:
    """Whether FSDP has put `parameter` in the place of `before` for a forward and backward."""
    return not parameter.is_leaf or (is_sharded(before) and not is_sharded(parameter))
