"""Linears whose experts a gate merges for each sample: outputs, and no weight to read."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ..finding.place import PlaceInGroup
from ..fusion.outside_access import require_sound
from .merging import merged_linear
from .pooling import Segments, mean_of_tokens, segments_of


def gated_by_sample(linear: Any, gate: Any, place: PlaceInGroup, x: Tensor) -> Tensor:
    """The output of a linear that merges its experts for each sample, or each segment of it."""
    feature_dim = place.projection.feature_dim
    features_last = x.movedim(feature_dim, -1)
    if gate.takes_single_samples and features_last.ndim == 2:
        return _gated(linear, gate, place, features_last[None])[0].movedim(-1, feature_dim)
    is_moved = gate.batch_dim > 0 and features_last.ndim > 2
    samples_first = features_last.movedim(gate.batch_dim, 0) if is_moved else features_last
    y = _gated(linear, gate, place, samples_first)
    y = y.movedim(0, gate.batch_dim) if is_moved else y
    return y.movedim(-1, feature_dim)


def _gated(linear: Any, gate: Any, place: PlaceInGroup, x: Tensor) -> Any:
    """The output, shape (B, ..., out), for an input of shape (B, ..., D)."""
    tokens, mask = _in_samples(gate, x)
    gate.forwards.watch.require_open(gate, tokens.shape[1])
    segments = segments_of(tokens, gate.config.segment_length, mask) if gate.is_causal else None
    gates = _gates(gate, place, tokens, mask, segments)
    if gate.config.level == "token":
        # Applied to segments or tokens alike: each token goes through it by itself.
        block = gate.blocks[place.index]
        tokens = block(tokens)
        if segments is not None:
            segments = dataclasses.replace(segments, x=block(segments.x))
    stacks = {name: _stack(linear, name) for name in linear.parametrizations}
    y = merged_linear(
        tokens if segments is None else segments.x.flatten(0, 1),
        gates,
        stacks["weight"].flatten(2),  # of a convolution with a kernel of one
        stacks.get("bias"),
        kept=gate.config.kept,
        is_transposed=place.projection.weight_out == 1,
    )
    if segments is not None:
        y = segments.joined(y.unflatten(0, segments.x.shape[:2]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _stack(linear: Any, name: str) -> Tensor:
    """The experts of a weight or bias, shape (N, *S)."""
    require_sound(linear, name)
    fusion, *others = linear.parametrizations[name]
    if others:
        raise RuntimeError(
            f"{type(others[-1]).__name__} was registered on a {name} of "
            f"{fusion.fusion_weights.group!r} after wrap(), and would be left out where experts "
            'are merged for each sample. Leave the linear out with filter_fn, or use level="task".'
        )
    stack: Tensor = linear.parametrizations[name].original
    return stack


def _gates(
    gate: Any, place: PlaceInGroup, tokens: Tensor, mask: Tensor | None, segments: Segments | None
) -> Tensor:
    """Gates of the samples or segments, shape (B, N): those of the FFN's input if it has one."""
    if not place.is_first and gate.current is not None:
        return gate.current
    if not (place.is_first or place.reads_input):
        raise RuntimeError(
            f"A linear of {gate.group!r} ran without the linear whose input their shared gate "
            "reads: before it, outside of its checkpoint, or replaced after wrap(). Checkpoint the "
            "whole FFN, put the linear back, or give each linear its own gate, shared_gate=False."
        )
    pooled = mean_of_tokens(tokens, mask) if segments is None else segments.pooled.flatten(0, 1)
    chosen = gate.choose(pooled, is_noisy=gate.training)
    gate.record(chosen)
    if not place.is_last:
        gate.current = chosen.gates
    return chosen.gates


def _in_samples(gate: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The tokens by sample, shape (B, T, D), with their mask, shape (B, T), if there is one.

    A mask also says which tokens are of one sample where a model has put all in one dimension.
    """
    mask = gate.mask_for(x, is_moved=gate.batch_dim > 0 and x.ndim > 2)
    if mask is not None:
        mask = mask.reshape(gate.token_mask.shape if x.ndim == 2 else (x.shape[0], -1))
        return x.reshape(*mask.shape, x.shape[-1]), mask
    if x.ndim == 1:
        return x.view(1, 1, -1), None
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]), None


_HARMLESS = {
    Tensor.size,
    Tensor.stride,
    Tensor.dim,
    Tensor.numel,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.__repr__,
}
_TENSORS = {"data", "T", "mT", "H", "mH", "real", "imag"}
"""The attributes that share the numbers of an expert, which are not the weight's."""


class PerSampleWeight(Tensor):
    """Says its shape, dtype and device, which some models ask for, and computes nothing."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let questions through, and raise for everything else."""
        is_attribute = getattr(func, "__name__", "") == "__get__"
        if func in _HARMLESS or (is_attribute and func.__self__.__name__ not in _TENSORS):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise RuntimeError(
            "This linear merges its experts again for each sample, so that it has no weight to "
            "compute with. Call the linear itself; or leave it out with filter_fn; or wrap with "
            'level="task".'
        )


def per_sample_weight(experts: Tensor) -> Tensor:
    """A stand-in for the weight, shape (*S), of the stack `experts`, shape (N, *S)."""
    stand_in = experts[0]
    if torch.compiler.is_compiling():  # a model asks for its dtype; what is wrong, eager mode says
        return stand_in
    return stand_in.detach().as_subclass(PerSampleWeight)
