"""The names of modules and tensors, without what DDP and torch.compile put around them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn


def clean_name(name: str) -> str:
    """A name without what torch.compile and torch's `checkpoint_wrapper` add to it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def listed(names: Iterable[str], most: int = 4) -> str:
    """Names for a message, as "a, b and 7 more"; the empty one is the model's own."""
    names = [name or "(the model itself)" for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def globs_of(names: Iterable[str]) -> list[str]:
    """Globs that match the names, with a star for each number."""
    return list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names))


def unwrapped(module: nn.Module) -> nn.Module:
    """A module without what DDP and torch.compile put around it."""
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module
