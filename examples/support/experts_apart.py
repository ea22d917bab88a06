"""How far apart experts have grown in training."""

import torch
from torch import nn

from exfusion_param.shards import whole


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
        The spread; None if the model has no stacks that move.
    """
    before = dict(start.named_parameters())
    apart = together = 0.0
    for name, parameter in model.named_parameters():
        if not name.endswith("weight.original") or not parameter.requires_grad:
            continue
        old, new = (whole(stack).cpu().double() for stack in (before[name], parameter))
        distance, first = new - new.mean(dim=0), old - old.mean(dim=0)
        left = (distance * first).sum() / first.square().sum().clamp(min=1e-30)
        apart += (distance - left * first).square().sum().item() / len(new)
        together += (new.mean(dim=0) - old.mean(dim=0)).square().sum().item()
    return (apart / together) ** 0.5 if together else None
