"""An optimizer's step on expert stacks, some experts at a time.

Note [Parts of a stack]
With `G = dL/dW` the gradient of expert i is `w_i G`, so a stack's N-fold gradient need not exist. A
step takes parts of stacks, as many as make a batch: it writes the gradients of their experts into a
buffer that the next batch overwrites, has one of torch's own kernels update them, and adds them to
the fused tensor. Parts and batches are as large as slices (sliced_sums.py). How stacks are cut does
not change from step to step, so it is planned once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..tensors.sliced_sums import RunningFusion, slice_size, slices
from .state_storage import store, to_work_on


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Stack:
    """The rows of a stack and its states that this rank has.

    Args:
        experts: shape (N, *S).
        states: the optimizer's, each of shape (N, *S).
        count: how many steps the optimizer has made before, shape ().
        dtype: that the update is computed in; numbers of another one are copied for it.
    """

    experts: Tensor
    states: Sequence[Tensor]
    count: Tensor
    dtype: torch.dtype


StackStep = tuple[Tensor, Tensor, Tensor, Tensor]
"""What one step does to a stack: `G` of the fused tensor, shape (*S); the fusion weights that `G`
was taken under, shape (N,); where to fuse the new experts, shape (*S); and the fusion weights to
fuse them with, shape (N,)."""


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Cut:
    """Some experts of a stack, n of them.

    Args:
        index: of the stack.
        part: which experts.
        experts: shape (n, *S).
        states: each of shape (n, *S).
        is_plain: whether they are updated in their place.
        is_last: whether they are the last ones of the stack.
        flat: shape (numbers of an expert, N) if they are all of the stack and plain, else None.
    """

    index: int
    part: slice
    experts: Tensor
    states: Sequence[Tensor]
    is_plain: bool
    is_last: bool
    flat: Tensor | None


class Batch(NamedTuple):
    """Some experts to update in place, all on one device and of one dtype.

    Args:
        experts: parts of stacks, each of shape (n, *S).
        gradients: theirs.
        states: for each kind of state a list like them.
        counts: how many steps came before, each of shape (), to be incremented in place.
    """

    experts: list[Tensor]
    gradients: list[Tensor]
    states: list[list[Tensor]]
    counts: list[Tensor]


Update = Callable[[Batch], None]


class StackPlan:
    """How some stacks are cut for an optimizer's steps.

    Args:
        stacks: of one optimizer's parameter group.
    """

    def __init__(self, stacks: Sequence[Stack]) -> None:
        self.stacks = stacks
        self._batches = list(self._cut())
        cuts = [cut for batch in self._batches for cut in batch]
        self._uncut = {cut.index for cut in cuts if cut.flat is not None}

    @torch.no_grad()
    def step(
        self,
        steps: Sequence[StackStep],
        update: Update,
        generators: Callable[[torch.device], torch.Generator],
    ) -> None:
        """Update the stacks, and fuse them.

        Args:
            steps: one for each stack.
            update: updates some experts.
            generators: for each device what rounds what is stored in bfloat16.
        """
        fusions = {
            index: RunningFusion(fused, new_weights)
            for index, (_, _, fused, new_weights) in enumerate(steps)
            if index not in self._uncut  # which are fused at once
            or fused.dtype != new_weights.dtype
            or not fused.is_contiguous()
        }
        scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        for cuts in self._batches:
            sizes = [cut.experts.numel() for cut in cuts]
            stack = self.stacks[cuts[0].index]
            place = (stack.experts.device, stack.dtype)
            if place not in scratch or scratch[place].numel() < sum(sizes):
                scratch[place] = torch.empty(sum(sizes), device=place[0], dtype=place[1])
            buffers = scratch[place][: sum(sizes)].split(sizes)
            self._step_batch(cuts, buffers, steps, update, generators, fusions)

    def _step_batch(
        self,
        cuts: Sequence[_Cut],
        buffers: Sequence[Tensor],
        steps: Sequence[StackStep],
        update: Update,
        generators: Callable[[torch.device], torch.Generator],
        fusions: Mapping[int, RunningFusion],
    ) -> None:
        batch = Batch([], [], [[] for _ in cuts[0].states], [])
        for cut, buffer in zip(cuts, buffers, strict=True):
            stack, (gradient, weights, _, _) = self.stacks[cut.index], steps[cut.index]
            weights = weights[cut.part].to(buffer).view(-1, *[1] * gradient.ndim)
            out = buffer.view(cut.experts.shape)
            batch.gradients.append(torch.mul(weights, gradient, out=out))
            batch.experts.append(
                cut.experts if cut.is_plain else to_work_on(cut.experts, stack.dtype)
            )
            for kind, state in zip(batch.states, cut.states, strict=True):
                kind.append(state if cut.is_plain else to_work_on(state, stack.dtype))
            batch.counts.append(stack.count if cut.is_last else stack.count.clone())
        update(batch)
        for index, cut in enumerate(cuts):
            if not cut.is_plain:
                generator = generators(cut.experts.device)
                store(cut.experts, batch.experts[index], generator)
                for kind, state in zip(batch.states, cut.states, strict=True):
                    store(state, kind[index], generator)
            if cut.flat is None or cut.index in fusions:
                fusions[cut.index].add(cut.experts, cut.part)
            else:  # as a running fusion does
                _, _, fused, new_weights = steps[cut.index]
                total = fused.view(-1)
                torch.addmv(total, cut.flat, new_weights, beta=0, out=total)

    def _cut(self) -> Iterator[list[_Cut]]:
        """Cuts of stacks, as many at a time as one batch takes, and at least one."""
        batch: list[_Cut] = []
        room, kind = 0, None  # of the batch
        for index, stack in enumerate(self.stacks):
            own_kind = stack.experts.device, stack.dtype
            for part in slices(stack.experts):
                cut = _cut_of(stack, index, part)
                if kind != own_kind or cut.experts.numel() > room:
                    if batch:
                        yield batch
                    batch, room, kind = [], slice_size(own_kind[0]), own_kind
                batch.append(cut)
                room -= cut.experts.numel()
        if batch:
            yield batch


def _cut_of(stack: Stack, index: int, part: slice) -> _Cut:
    experts = stack.experts[part]
    states = [state[part] for state in stack.states]
    is_plain = all(type(t) is Tensor and t.dtype == stack.dtype for t in (experts, *states))
    is_last = part.stop == stack.experts.shape[0]
    is_uncut = is_plain and is_last and part.start == 0
    flat = experts.reshape(experts.shape[0], math.prod(experts.shape[1:])).T if is_uncut else None
    return _Cut(index, part, experts, states, is_plain, is_last, flat)
