"""Padding masks of models that are not transformers': followed by torch's names, or a warning.

`key_padding_mask`, and what torch's Transformers call after it, is true (or below zero) at padding.
Routers inside of a module that takes one follow it. For other arguments that a model calls a mask
or lengths nothing tells what they mean, so where one may mark padding the model warns.

A mask stays until the next forward, as those of attention_masks.py do.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..fusion_weights.token_pool import TokenPool

FOLLOWED = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask")
_MAY_MARK_PADDING = re.compile(r"mask|padding|lengths?$|valid", re.IGNORECASE)
_IS_OF_TOKENS = re.compile(r"^attention_mask|pad|valid|token", re.IGNORECASE)
_IS_OTHER = re.compile(r"^(src|tgt|memory)_mask|attn|causal|cross|loss|label|masked", re.IGNORECASE)


def follow_padding_masks(model: nn.Module, pools: Collection[TokenPool]) -> None:
    """Let fusion weights that pool over tokens follow torch's padding masks; warn of others."""
    module_of: dict[TokenPool, tuple[nn.Module, tuple[str, int]]] = {}
    for module in model.modules():  # an outer one comes before those inside of it
        found = [(name, at) for name, at in _arguments_of(module).items() if name in FOLLOWED]
        if len(found) != 1:  # nn.Transformer takes two, and hands them on
            continue
        inside = set(module.modules())
        for pool in pools:
            # A hook in an encoder's layer would turn off torch's fast path in eval.
            is_known = pool in module_of and isinstance(module, nn.TransformerEncoderLayer)
            if pool in inside and not is_known:
                module_of[pool] = module, found[0]
    for pool, (module, argument) in module_of.items():
        hook = functools.partial(_take_mask, pool, *argument)
        pool.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    rest = [pool for pool in pools if pool not in module_of]
    names = {
        name: at
        for name, at in _arguments_of(model).items()
        if _MAY_MARK_PADDING.search(name) and not _IS_OTHER.search(name)
    }
    if rest and names:
        hook = functools.partial(_warn_of_masks, rest[0], names, set())
        rest[0].handles.append(model.register_forward_pre_hook(hook, with_kwargs=True))


def _arguments_of(module: nn.Module) -> Mapping[str, int]:
    """The names of what the forward takes, and their places."""
    try:
        return {name: at for at, name in enumerate(inspect.signature(module.forward).parameters)}
    except (TypeError, ValueError):  # of C, or scripted
        return {}


def _given(name: str, position: int, args: Any, kwargs: Mapping[str, Any]) -> Any:
    return args[position] if position < len(args) else kwargs.get(name)


def _take_mask(
    pool: TokenPool, name: str, position: int, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> None:
    if pool.has_given_mask:
        return
    mask = _given(name, position, args, kwargs)
    if isinstance(mask, Tensor):
        mask = ~mask if mask.dtype == torch.bool else mask >= 0
    pool.remember("token_mask", mask)


def _warn_of_masks(
    pool: TokenPool,
    names: Mapping[str, int],
    warned: set[str],
    module: nn.Module,
    args: Any,
    kwargs: dict[str, Any],
) -> None:
    if torch.compiler.is_compiling() or not module.training or pool.token_mask is not None:
        return
    for name, position in names.items():
        mask = _given(name, position, args, kwargs)
        if name not in warned and isinstance(mask, Tensor) and _shows_padding(name, mask):
            warned.add(name)
            warnings.warn(
                f"{type(module).__name__} is called with {name!r}, of shape {tuple(mask.shape)}, "
                "which its routers do not follow, as its meaning is not known: all tokens count. "
                "If it marks padding, run the forward within exf.token_mask(model, mask), with a "
                "mask of (batch, tokens) that is true where a token counts.",
                stacklevel=2,
            )


def _shows_padding(name: str, mask: Tensor) -> bool:
    """Whether it may mark padding, and does; a GPU is not made to wait to look."""
    is_of_pairs = mask.ndim > 1 and mask.shape[-1] == mask.shape[-2]
    if mask.numel() < 2 or (is_of_pairs and not _IS_OF_TOKENS.search(name)):
        return False
    return mask.device.type != "cpu" or bool((mask != mask.flatten()[0]).any())
