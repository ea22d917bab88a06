"""Whether the numbers of a tensor can be looked at here, without disturbing what runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .shards import is_sharded, local


def can_be_read(tensor: Tensor) -> bool:
    """Whether a tensor has numbers of its own, which nothing that runs now traces or records."""
    if type(tensor) not in (Tensor, nn.Parameter) and not is_sharded(tensor):
        return False  # such as MEO's stand-in for a weight, which raises where it is computed with
    part = local(tensor)
    has_numbers = type(part) is Tensor and not part.is_meta
    return has_numbers and not (is_transformed(part) or is_capturing(part))


def is_transformed(y: Tensor) -> bool:
    """Whether `torch.func`, forward-mode differentiation or a tracer sees this tensor."""
    if torch.compiler.is_compiling():
        return False
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    is_wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(y)
    return is_wrapped or forward_ad._current_level >= 0


def is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is recorded, within which nothing can be compared."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
