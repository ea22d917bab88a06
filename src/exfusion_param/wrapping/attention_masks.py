"""The attention mask that a model of transformers is called with is its routers' token mask.

`wrap` sets this up.

Each `PreTrainedModel` inside of a model has a mask of its own: the decoder of an encoder-decoder is
one, and is called with the decoder's mask. A router follows the innermost one that holds it.

Masks of another shape, such as (batch, 1, tokens, tokens), do not tell which tokens are padding.
The model warns of one, and takes what `exf.token_mask` gives.

A mask stays until the next forward, because activation checkpointing runs the layers again in the
backward. So with activation checkpointing run each backward before the next forward.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..fusion_weights.token_pool import Layout, TokenPool

MASK = "attention_mask"

_TOKENS_FIRST = {"xlnet", "fsmt"}
"""Types whose layers run on (tokens, batch, D), though the model is given (batch, tokens)."""


def follow_attention_masks(model: nn.Module, new_pools: Collection[TokenPool]) -> list[TokenPool]:
    """Let fusion weights that pool over tokens follow the attention masks of a model's calls.

    Returns:
        Those that are in no model of transformers.
    """
    module_of: dict[TokenPool, tuple[nn.Module, list[str]] | None] = {}
    theirs: set[TokenPool] = set()
    for module in model.modules():  # an outer one comes before those inside of it
        if not isinstance(module, PreTrainedModel):
            continue
        inside = set(module.modules())
        pools = [pool for pool in new_pools if pool in inside]
        theirs.update(pools)
        for pool in pools:
            pool.layout = _layout_in(module, pool.layout)
        arguments = list(inspect.signature(module.forward).parameters)
        if MASK in arguments:
            module_of |= dict.fromkeys(pools, (module, arguments))
        elif module.main_input_name != "input_ids":  # a vision tower, with tokens of its own
            module_of |= dict.fromkeys(pools)
    for pool, found in module_of.items():
        if found is None:
            continue
        module, arguments = found
        hook = functools.partial(_take_mask, pool, arguments.index(MASK))
        pool.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    return [pool for pool in new_pools if pool not in theirs]


def _layout_in(model: PreTrainedModel, layout: Layout) -> Layout:
    """How a model has its tokens inside, beside what is known of one around it."""
    pads = any(name.startswith("_pad_to_") for name in dir(type(model)))  # to a window, or block
    tokens_first = model.config.model_type in _TOKENS_FIRST
    return Layout(layout.tokens_first or tokens_first, layout.pads or pads)


def _take_mask(
    pool: TokenPool, position: int, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> None:
    if pool.has_given_mask:
        return
    mask = args[position] if position < len(args) else kwargs.get(MASK)
    is_padding_mask = isinstance(mask, Tensor) and mask.ndim == 2
    pool.token_mask = mask if is_padding_mask else None
    if mask is None or is_padding_mask or torch.compiler.is_compiling():
        return
    if not (module.training or pool.pools_in_eval):
        return
    kind = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    warnings.warn(
        f"The {MASK} of {type(module).__name__} ({kind}) says what attends to what, not which "
        "tokens count, so all of them count for the routers, padding too. If there is padding, run "
        "the forward within exf.token_mask(model, mask), with a mask of (batch, tokens).",
        stacklevel=2,
    )
