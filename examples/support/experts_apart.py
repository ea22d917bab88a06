"""How far apart experts have grown in training."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from exfusion_param.fusion.lookup import groups_of, original
from exfusion_param.tensors.shards import full_tensor


@torch.no_grad()
def displacement_spread(model: nn.Module, start: nn.Module) -> float | None:
    """How differently the experts have moved, as a share of how they have moved together.

    An expert's distance from the experts' mean is, in each stack, what is left of its distance at
    the start, which weight decay shrinks alike for all, and a rest. The spread is the root mean
    square of the rests of all stacks, by that of the mean's displacement: 0 if all experts have
    learned the same.

    Args:
        model: wrapped and trained.
        start: the same model as it was before training.

    Returns:
        The spread; None if the model has no experts, or they have not moved.
    """
    apart = together = 0.0
    for before, after in zip(_stacks(start), _stacks(model), strict=True):
        old, new = (full_tensor(stack).cpu().double() for stack in (before, after))
        distance, first = new - new.mean(dim=0), old - old.mean(dim=0)
        left = (distance * first).sum() / first.square().sum().clamp(min=1e-30)
        apart += (distance - left * first).square().sum().item() / len(new)
        together += (new.mean(dim=0) - old.mean(dim=0)).square().sum().item()
    return (apart / together) ** 0.5 if together else None


def _stacks(model: nn.Module) -> Iterator[Tensor]:
    """The experts of all weights, each of shape (N, *S), under either `fuse_on`."""
    for weights in groups_of(model):
        if weights.fused:
            yield from (fused.experts() for fused in weights.fused if fused.name == "weight")
        else:
            yield from (original(linear, "weight") for linear in weights.linears)
