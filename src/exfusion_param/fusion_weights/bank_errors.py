"""The errors of forwards that a memory bank cannot follow, each with its way out."""

from __future__ import annotations


def two_threads(group: str) -> RuntimeError:
    """Two threads train one model."""
    return RuntimeError(
        f"{group!r} is trained by two threads at the same time, and its memory bank can "
        "follow only one input. Train in one thread, or in processes with "
        "DistributedDataParallel. In eval mode threads can share a model."
    )


def offloaded_in_training(group: str) -> RuntimeError:
    """The router is on the meta device."""
    return RuntimeError(
        f"The router of {group!r} is on the meta device in a training forward. "
        "accelerate's offloading is for inference: call model.eval()."
    )


def unobserved(group: str) -> RuntimeError:
    """A linear runs without the one whose input is routed."""
    return RuntimeError(
        f"A linear of {group!r} ran without the one whose input its shared router "
        "reads: before it, outside of its checkpoint, in two threads at once, or replaced "
        "after wrap(). Checkpoint the whole FFN, or give each linear its own router, "
        "wrap(model, shared_router=False); train in one thread; put the linear back."
    )
