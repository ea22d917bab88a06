"""Names of modules and tensors."""

from __future__ import annotations


def clean_name(name: str) -> str:
    """A name without what torch.compile and torch's `checkpoint_wrapper` add to it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
