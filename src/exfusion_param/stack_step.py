"""An optimizer's step on expert stacks, some experts at a time.

Note [Parts of a stack]
With `G = dL/dW` the gradient of expert i is `w_i G`, so a stack's N-fold gradient need not exist. A
step takes parts of stacks, as many as make a batch: it writes the gradients of their experts into a
buffer that the next batch overwrites, has one of torch's own kernels update them, and adds them to
the fused tensor. Parts and batches are as large as slices (expert_sums.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .expert_sums import RunningFusion, slice_size, slices
from .state_storage import store, to_work_on


@dataclasses.dataclass(frozen=True, eq=False)
class StackStep:
    """What a step does to one stack: to the rows of it that this rank holds.

    Args:
        experts: shape (N, *S).
        gradient: `G` of the fused tensor, shape (*S).
        weights: the fusion weights that `G` was taken under, shape (N,).
        dtype: that the update is computed in; numbers of another one are copied for it.
        fusion: takes the new experts.
        states: the optimizer's, each of shape (N, *S).
        count: how many steps the optimizer has made before, shape ().
        generator: rounds what is stored in bfloat16.
    """

    experts: Tensor
    gradient: Tensor
    weights: Tensor
    dtype: torch.dtype
    fusion: RunningFusion
    states: Sequence[Tensor]
    count: Tensor
    generator: torch.Generator


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Some experts of a stack, n of them, as the optimizer gets them; all of one dtype.

    Args:
        experts: shape (n, *S), to be updated in place.
        gradient: theirs, shape (n, *S).
        states: each of shape (n, *S), to be updated in place.
        count: how many steps came before, shape (), to be updated in place.
    """

    experts: Tensor
    gradient: Tensor
    states: list[Tensor]
    count: Tensor


Update = Callable[[list[Part]], None]
Cut = tuple[StackStep, slice]


@torch.no_grad()
def update_stacks(steps: Iterable[StackStep], update: Update) -> None:
    """Update stacks, and fuse them.

    Args:
        steps: one for each stack.
        update: updates the experts of some parts, all on one device and of one dtype.
    """
    scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for cuts in _batches(steps):
        sizes = [_numel(cut) for cut in cuts]
        device, dtype = place = (cuts[0][0].experts.device, cuts[0][0].dtype)
        if place not in scratch or scratch[place].numel() < sum(sizes):
            scratch[place] = torch.empty(sum(sizes), device=device, dtype=dtype)
        buffers = scratch[place][: sum(sizes)].split(sizes)
        parts = [_part(cut, buffer) for cut, buffer in zip(cuts, buffers, strict=True)]
        update(parts)
        for cut, part in zip(cuts, parts, strict=True):
            _finish(cut, part)


def _part(cut: Cut, buffer: Tensor) -> Part:
    """The experts of a cut, with their gradients in `buffer`."""
    step, part = cut
    experts = step.experts[part]
    weights = step.weights[part].to(buffer).view(-1, *[1] * step.gradient.ndim)
    gradient = torch.mul(weights, step.gradient, out=buffer.view(experts.shape))
    states = [to_work_on(state[part], buffer.dtype) for state in step.states]
    return Part(to_work_on(experts, buffer.dtype), gradient, states, step.count.clone())


def _finish(cut: Cut, part: Part) -> None:
    """Store what was not updated in its place, and fuse."""
    step, where = cut
    for tensor, values in zip(
        [step.experts, *step.states], [part.experts, *part.states], strict=True
    ):
        store(tensor[where], values, step.generator)
    step.fusion.add(step.experts[where], where)
    if where.stop == len(step.experts):
        step.count.copy_(part.count)


def _batches(steps: Iterable[StackStep]) -> Iterator[list[Cut]]:
    """Cuts of stacks, as many at a time as one batch takes, and at least one."""
    batch: list[Cut] = []
    room = 0
    for step in steps:
        for part in slices(step.experts):
            cut = (step, part)
            if batch and (_numel(cut) > room or not _alike(step, batch[0][0])):
                yield batch
                batch = []
            if not batch:
                room = slice_size(step.experts.device)
            batch.append(cut)
            room -= _numel(cut)
    if batch:
        yield batch


def _numel(cut: Cut) -> int:
    step, part = cut
    return (part.stop - part.start) * step.gradient.numel()


def _alike(one: StackStep, other: StackStep) -> bool:
    return one.experts.device == other.experts.device and one.dtype == other.dtype
