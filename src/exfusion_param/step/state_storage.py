"""How optimizers store the states of expert stacks: in full, in bfloat16 or in 8 bits.

What is stored in less than float32 is updated in float32. Numbers in bfloat16 are then rounded
stochastically, up or down with the probabilities that make them right on average: rounding to
nearest would lose each change smaller than 1/256 of the value, such as every decay of AdamW's
second moment. 8 bits are torchao's, with a scale for each 256 numbers (Dettmers et al., arXiv
2110.02861).
"""

from __future__ import annotations

import importlib
import math
import sys
from typing import Any, Literal

import torch
from torch import Tensor

from ..tensors.precision import accumulation_dtype
from ..tensors.shards import is_sharded, local, with_memory_of

StateDtype = torch.dtype | Literal["8bit"]
BLOCK = 256
"""Numbers that share a scale in 8 bits."""


def check_state_dtype(dtype: StateDtype | None) -> None:
    """Raise if states cannot be stored so.

    Raises:
        ValueError: the dtype is not one of these.
        ImportError: 8 bits without torchao.
    """
    if dtype == "8bit":
        try:
            importlib.import_module("torchao.optim.subclass_8bit")  # lets torch.load read it too
        except ImportError as error:
            raise ImportError(
                'state_dtype="8bit" needs torchao. Run: pip install torchao'
            ) from error
    elif dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(
            f"state_dtype must be None, torch.float32, torch.bfloat16 or '8bit', got {dtype!r}."
        )


def stored(state: Tensor | None, stack: Tensor, dtype: StateDtype, signed: bool) -> Tensor:
    """A state of a stack, stored as asked for, and spread over the ranks as the stack is.

    Args:
        state: the state as it is, shape (N, *S); None starts with zeros.
        stack: shape (N, *S).
        dtype: to store it in.
        signed: whether the state may be negative; 8 bits resolve more without a sign.

    Returns:
        `state` if it is stored so. Stacks whose experts do not divide into blocks of 256 have no
        8-bit states, but states of their own dtype.
    """
    part = local(stack)
    # Of a sharded stack each rank has whole rows, of its own number.
    unit = math.prod(stack.shape[2:] if is_sharded(stack) else stack.shape[1:])
    if dtype == "8bit" and unit % BLOCK:
        dtype = stack.dtype
    if state is not None and dtype == (state.dtype if is_plain(local(state)) else "8bit"):
        return state
    if dtype == "8bit":
        from torchao.optim.subclass_8bit import OptimState8bit

        new = OptimState8bit.zeros(part.shape, signed, BLOCK, part.device, part.dtype)
    else:
        new = torch.zeros_like(part, dtype=dtype)
    if state is not None:
        new.copy_(to_work_on(local(state), accumulation_dtype(part.dtype)))
    return with_memory_of(new, stack)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds its numbers as they are."""
    module = sys.modules.get("torchao.optim.subclass_8bit")
    return module is None or not isinstance(tensor, module.OptimState8bit)


def to_work_on(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of a tensor in `dtype`: the tensor itself if that is how it stores them."""
    if is_plain(tensor):
        return tensor.to(dtype)
    quantized: Any = tensor
    return quantized.dequantize(dtype)


def store(tensor: Tensor, numbers: Tensor, generator: torch.Generator) -> None:
    """Store what `to_work_on` gave, after a change; the generator rounds to bfloat16."""
    if numbers.data_ptr() == tensor.data_ptr():
        return
    is_rounded = is_plain(tensor) and tensor.dtype == torch.bfloat16
    tensor.copy_(round_stochastically(numbers, generator) if is_rounded else numbers)


def round_stochastically(numbers: Tensor, generator: torch.Generator) -> Tensor:
    """The bfloat16 above or below each number, whose mean over many draws is the number.

    Args:
        numbers: any shape and floating dtype.
        generator: on the device of `numbers`.
    """
    bits = numbers.float().view(torch.int32)  # bfloat16 has the upper 16 of them
    draws = torch.empty(-(-bits.numel() // 4), dtype=torch.int64, device=bits.device)
    draws.random_(-(1 << 63), None, generator=generator)  # four numbers of 16 bits in each
    noise = draws.view(torch.int16)[: bits.numel()].view_as(bits).to(torch.int32)
    rounded = (bits + noise.bitwise_and_(0xFFFF)).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(numbers.isfinite(), rounded, numbers).to(torch.bfloat16)
