"""The attention mask that a model of transformers is called with is its banks' token mask.

`wrap` does this by itself.

Each `PreTrainedModel` inside of a model has a mask of its own: the decoder of an encoder-decoder is
one, and is called with the decoder's mask. A bank follows the innermost one that holds it.

A mask stays until the next forward, because activation checkpointing runs the layers again in the
backward. So with activation checkpointing run each backward before the next forward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..memory_bank import MemoryBank

MASK = "attention_mask"


def follow_attention_masks(model: nn.Module, new_banks: Collection[MemoryBank]) -> None:
    """Let memory banks follow the attention masks that a model is called with.

    Args:
        model: the wrapped model.
        new_banks: those of its banks that do not follow them yet.
    """
    holder_of: dict[MemoryBank, tuple[nn.Module, list[str]]] = {}
    for module in model.modules():  # an outer one comes before those inside of it
        if not isinstance(module, PreTrainedModel):
            continue
        arguments = list(inspect.signature(module.forward).parameters)
        if MASK in arguments:
            inside = set(module.modules())
            holder_of |= {bank: (module, arguments) for bank in new_banks if bank in inside}
    for bank, (holder, arguments) in holder_of.items():
        hook = functools.partial(_take_mask, bank, arguments.index(MASK))
        bank.handles.append(holder.register_forward_pre_hook(hook, with_kwargs=True))


def _take_mask(
    bank: MemoryBank, position: int, holder: nn.Module, args: Any, kwargs: dict[str, Any]
) -> None:
    mask = args[position] if position < len(args) else kwargs.get(MASK)
    is_padding_mask = isinstance(mask, Tensor) and mask.ndim == 2
    bank.token_mask = mask if is_padding_mask else None
