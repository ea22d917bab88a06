"""Errors for pipelines of torch in which votes cannot follow the gradient."""

from __future__ import annotations


def split_backwards(group: str) -> RuntimeError:
    """A zero-bubble schedule under "forward"."""
    return RuntimeError(
        f"The backwards of {group!r} computed the gradients of inputs and of weights apart, as "
        "pipelines with a zero-bubble schedule do, and its memory bank cannot tell which of them "
        'count under fuse_on="forward". Wrap with fuse_on="step", or take another schedule.'
    )


def lost_gradients(group: str) -> RuntimeError:
    """A zero-bubble schedule under FSDP2 that reshards."""
    return RuntimeError(
        f"Gradients of {group!r} are lost, as they are of a dense model: torch's pipelines with a "
        "zero-bubble schedule compute the gradients of inputs and of weights apart, and do not "
        "find weights that FSDP2 has resharded after the forward. Shard with fully_shard(..., "
        "reshard_after_forward=False), or take a schedule without zero bubbles, such as 1F1B."
    )
