"""What DDP, torch.compile and activation checkpointing put around modules and their names."""

from __future__ import annotations

from torch import nn


def clean_name(name: str) -> str:
    """A name without what torch.compile and torch's `checkpoint_wrapper` add to it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def unwrapped(module: nn.Module) -> nn.Module:
    """A module without what DDP and torch.compile put around it."""
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module
