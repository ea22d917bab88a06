"""Span corruption, what T5 learns from (Raffel et al., arXiv 1910.10683, section 3.1.4).

Spans of the text are taken out of the inputs, each replaced by a sentinel of its own; the targets
are the sentinels, each followed by what it stands for, and an end.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Lengths(NamedTuple):
    """How long things are, in tokens.

    Args:
        text: that is corrupted.
        inputs: what is left of it, with sentinels and the end.
        targets: what was taken out, with sentinels and the end.
        spans: how many are taken out.
        noise: tokens that are taken out.
    """

    text: int
    inputs: int
    targets: int
    spans: int
    noise: int


def lengths_for(inputs: int, density: float = 0.15, mean_span: float = 3.0) -> Lengths:
    """The longest text whose corrupted form is no longer than this.

    Args:
        inputs: tokens that the encoder sees.
        density: share of the text that is taken out.
        mean_span: tokens of a span, on average.
    """

    def of(text: int) -> Lengths:
        noise = min(max(round(text * density), 1), text - 1)
        spans = min(max(round(noise / mean_span), 1), text - noise)
        return Lengths(text, text - noise + spans + 1, noise + spans + 1, spans, noise)

    text = 2
    while of(text + 1).inputs <= inputs:
        text += 1
    return of(text)


def corrupt(
    text: Tensor, lengths: Lengths, sentinels: Tensor, end: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one text.

    Args:
        text: token ids, shape (lengths.text,).
        lengths: of `lengths_for`.
        sentinels: their ids in the order of use, at least as many as spans.
        end: the id of the end.
        generator: draws the spans.

    Returns:
        Shapes (lengths.inputs,) and (lengths.targets,).
    """
    kept = _parts(lengths.text - lengths.noise, lengths.spans, generator)
    taken = _parts(lengths.noise, lengths.spans, generator)
    sizes = torch.stack([kept, taken], dim=1).flatten().tolist()
    parts = text.split(sizes)
    last = text.new_tensor([end])
    marks = sentinels[: lengths.spans].to(text.dtype).split(1)
    inputs = [part for pair in zip(parts[::2], marks, strict=True) for part in pair]
    targets = [part for pair in zip(marks, parts[1::2], strict=True) for part in pair]
    return torch.cat([*inputs, last]), torch.cat([*targets, last])


def _parts(total: int, count: int, generator: torch.Generator) -> Tensor:
    """A total cut at random into this many parts of one or more, shape (count,)."""
    cuts = torch.randperm(total - 1, generator=generator)[: count - 1].sort().values + 1
    edges = torch.cat([cuts.new_zeros(1), cuts, cuts.new_tensor([total])])
    return edges.diff()
