"""The attention mask that a model of transformers is called with is its routers' token mask.

`wrap` sets this up.

Each `PreTrainedModel` inside of a model has a mask of its own: the decoder of an encoder-decoder is
one, and is called with the decoder's mask. A router follows the innermost one that holds it.

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

from ..fusion_weights.token_pool import TokenPool

MASK = "attention_mask"


def follow_attention_masks(model: nn.Module, new_pools: Collection[TokenPool]) -> None:
    """Let fusion weights that pool over tokens follow the attention masks of a model's calls.

    Args:
        model: the wrapped model.
        new_pools: those of its fusion weights that do not follow them yet.
    """
    module_of: dict[TokenPool, tuple[nn.Module, list[str]]] = {}
    for module in model.modules():  # an outer one comes before those inside of it
        if not isinstance(module, PreTrainedModel):
            continue
        arguments = list(inspect.signature(module.forward).parameters)
        if MASK in arguments:
            inside = set(module.modules())
            module_of |= {pool: (module, arguments) for pool in new_pools if pool in inside}
    for pool, (module, arguments) in module_of.items():
        hook = functools.partial(_take_mask, pool, arguments.index(MASK))
        pool.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))


def _take_mask(
    pool: TokenPool, position: int, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> None:
    mask = args[position] if position < len(args) else kwargs.get(MASK)
    is_padding_mask = isinstance(mask, Tensor) and mask.ndim == 2
    pool.token_mask = mask if is_padding_mask else None
