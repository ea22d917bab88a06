"""`linear.weight` where each sample has a weight of its own, so that no single one can be read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_HARMLESS = {
    Tensor.size,
    Tensor.stride,
    Tensor.dim,
    Tensor.numel,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.__repr__,
}


class PerSampleWeight(Tensor):
    """Says its shape, dtype and device, which some models ask for, and computes nothing."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let questions through, and raise for everything else."""
        if func in _HARMLESS or getattr(func, "__name__", "") == "__get__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise RuntimeError(
            "This linear merges its experts again for each sample, so that it has no weight to "
            "compute with. Call the linear itself; or leave it out with filter_fn; or wrap with "
            'level="task".'
        )


def per_sample_weight(experts: Tensor) -> Tensor:
    """A stand-in for the weight, shape (*S), of the stack `experts`, shape (N, *S)."""
    stand_in = experts[0]
    if torch.compiler.is_compiling():  # a model asks for its dtype; what is wrong, eager mode says
        return stand_in
    return stand_in.detach().as_subclass(PerSampleWeight)
