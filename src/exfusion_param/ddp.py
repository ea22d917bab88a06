"""DistributedDataParallel under `fuse_on="step"`, in which autograd reaches the leaves alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from .parametrization import groups_of

_IGNORED = "_ddp_params_and_buffers_to_ignore"
_SUFFIXES = ("original", "displacement", "fusion_weights.router", "fusion_weights.weights")


def leave_out_of_ddp(model: nn.Module) -> None:
    """Let DDP leave stacks and fusion weights alone, which get their gradients at the step.

    DDP waits for the gradients of all parameters that it knows of, but for those of the module's
    `_ddp_params_and_buffers_to_ignore`. `wrap` and `fuse` call this for their model. Call it for
    a module around that, before `DistributedDataParallel(module)`.

    Args:
        model: the module that DDP is to be made of.
    """
    others = [name for name in getattr(model, _IGNORED, ()) if not _is_ours(name)]
    ours = _without_gradient(model)
    module: Any = model
    if ours or others:
        module._ddp_params_and_buffers_to_ignore = [*others, *ours]
    elif hasattr(model, _IGNORED):
        del module._ddp_params_and_buffers_to_ignore


def _without_gradient(model: nn.Module) -> list[str]:
    by_step = [weights for weights in groups_of(model) if weights.config.fuse_on == "step"]
    own = {id(parameter) for weights in by_step for parameter in weights.moved_at_step()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in own]


def _is_ours(name: str) -> bool:
    return ".parametrizations." in f".{name}" and name.endswith(_SUFFIXES)
