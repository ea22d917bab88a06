"""Numbers to log while training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .fusion.lookup import labels_of, original
from .fusion_weights.base import FusionWeights
from .fusion_weights.memory_bank import MemoryBank
from .tensors.precision import accumulation_dtype
from .tensors.ranks import ALONE, sum_together
from .tensors.shards import full_tensor, holders_of, local, with_all_experts


@torch.no_grad()
def metrics(model: nn.Module) -> dict[str, float]:
    """Measure fusion weights and experts of a wrapped model, as a flat dict for any tracker.

    `g` is the name of an FFN group (of a linear, if each has its own router), or the class of the
    model if the model is a single FFN:

    - `fusion_weights/g/i`: fusion weight of expert i; for a memory bank, its current state.
    - `entropy/g`: entropy of the fusion weights, scaled to sum to one, in nats.
    - `effective_experts/g`: exp of that entropy: N if the fusion weights are equal, 1 if one expert
      has all the weight, nan while they are zero.
    - `expert_distance/g`: root mean square distance of the experts' weights from their mean,
      relative to the root mean square of the mean.
    - `bank_mass/g`: sum of the memory bank; from zeros it grows as `1 - momentum^t`. `mb` only.

    All values are copied from the device at once. For a sharded model, call this on all ranks;
    they exchange two numbers per group.

    Raises:
        ValueError: nothing is wrapped.

    Examples:
        >>> model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
        >>> values = exf.metrics(exf.wrap(model, num_experts=2, variant="sw"))
        >>> list(values)
        ['fusion_weights/0/0', 'fusion_weights/0/1', 'entropy/0', 'effective_experts/0',
         'expert_distance/0']
        >>> values["fusion_weights/0/1"]
        0.5
    """
    groups = labels_of(model)
    if not groups:
        raise ValueError(f"{type(model).__name__} has no wrapped linear to measure.")
    values: dict[str, Tensor] = {}
    distances = iter(_distances(groups))
    for group, name in groups.items():
        fusing = full_tensor(group.reported()).float()
        values |= {f"fusion_weights/{name}/{i}": weight for i, weight in enumerate(fusing)}
        values[f"entropy/{name}"] = entropy = _entropy(fusing)
        values[f"effective_experts/{name}"] = entropy.exp()
        values[f"expert_distance/{name}"] = next(distances)
        if isinstance(group, MemoryBank):
            values[f"bank_mass/{name}"] = group.numbers.float().sum()
    device = next(iter(values.values())).device  # a model may lie on several
    numbers = torch.stack([value.to(device) for value in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))


def _entropy(weights: Tensor) -> Tensor:
    """Entropy in nats of weights, shape (N,), scaled to sum one; learned ones may be negative."""
    shares = weights.abs() / weights.abs().sum()
    return torch.special.entr(shares).sum()


def _distances(groups: Iterable[FusionWeights]) -> list[Tensor]:
    """The distance between the experts of each group."""
    sums, ranks = [], ALONE
    for group in groups:
        group.end_forward()
        stacks = _weight_stacks(group)
        parts = [local(with_all_experts(stack)) for stack in stacks]
        sums.append(torch.stack([_sums_of_squares(part) for part in parts]).sum(dim=0))
        ranks = holders_of(stacks[0])
    return [(within / across).sqrt() for within, across in sum_together(ranks, sums)]


def _weight_stacks(group: FusionWeights) -> list[Tensor]:
    """The experts of a group's weights, each of shape (N, *S)."""
    if group.fused:
        return [fused.experts() for fused in group.fused if fused.name == "weight"]
    return [original(linear, "weight") for linear in group.linears]


def _sums_of_squares(stack: Tensor) -> Tensor:
    """Squares of the experts' mean distance from their mean, and of the mean, shape (2,)."""
    mean = stack.mean(dim=0, dtype=accumulation_dtype(stack.dtype))
    # One expert at a time: the difference of whole stacks would take their memory once more.
    within = [_sum_of_squares(expert - mean) / len(stack) for expert in stack]
    return torch.stack([torch.stack(within).sum(), _sum_of_squares(mean)])


def _sum_of_squares(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor).square().float()
