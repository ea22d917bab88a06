"""Padding masks that modules are called with are the token masks of the routers inside of them.

A router follows the innermost module around it that takes one:

- a model of transformers takes an `attention_mask`. The decoder of an encoder-decoder is a model by
  itself, and is called with the decoder's mask. Masks of another shape than (batch, tokens) do not
  tell which tokens are padding, so the model warns of one.
- other modules take torch's `key_padding_mask`, or what torch's Transformers call after it, which
  is true (or below zero) at padding.

For other arguments that a model calls a mask or lengths nothing tells what they mean, so where one
may mark padding the model warns.

A mask stays until the next forward, because activation checkpointing runs the layers again in the
backward. So with activation checkpointing run each backward before the next forward.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..finding.attention import attention_of
from ..fusion_weights.token_pool import Layout, TokenPool

ATTENTION_MASK = "attention_mask"
INVERSE = "input_mask"
"""XLNet's, which is 1 at padding, and which it takes instead of an attention mask."""
FOLLOWED = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask")
_MAY_MARK_PADDING = re.compile(r"mask|padding|lengths?$|valid", re.IGNORECASE)
_IS_OF_TOKENS = re.compile(r"^attention_mask|pad|valid|token", re.IGNORECASE)
_IS_OTHER = re.compile(r"^(src|tgt|memory)_mask|attn|causal|cross|loss|label|masked", re.IGNORECASE)
_TOKENS_FIRST = {"xlnet", "fsmt"}
"""Types of transformers' models that are given (batch, tokens), and run on (tokens, batch, D)."""


def follow_padding_masks(model: nn.Module, pools: Collection[TokenPool]) -> None:
    """Let fusion weights that pool over tokens follow a model's padding masks; warn of others."""
    _note_tokens_first(model, pools)
    taken: dict[TokenPool, tuple[nn.Module, str]] = {}
    in_transformers: set[TokenPool] = set()
    for module in model.modules():  # an outer one comes before those inside of it
        arguments = _arguments_of(module)
        found = [name for name in FOLLOWED if name in arguments]
        if _is_of_transformers(module):
            for pool in _inside(module, pools):
                in_transformers.add(pool)
                pool.layout = _layout_in(module, pool.layout)
                if ATTENTION_MASK in arguments:
                    taken[pool] = module, ATTENTION_MASK
                elif module.main_input_name != "input_ids":  # a vision tower, with its own tokens
                    taken.pop(pool, None)
        elif len(found) == 1:  # nn.Transformer takes two, and hands them on
            for pool in _inside(module, pools):
                # A hook in an encoder's layer would turn off torch's fast path in eval.
                is_known = pool in taken and isinstance(module, nn.TransformerEncoderLayer)
                if pool not in in_transformers and not is_known:
                    taken[pool] = module, found[0]
    for pool, (module, name) in taken.items():
        hook = functools.partial(_take_mask, pool, name, _arguments_of(module))
        pool.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    rest = [pool for pool in pools if pool not in taken and pool not in in_transformers]
    names = {
        name: at
        for name, at in _arguments_of(model).items()
        if _MAY_MARK_PADDING.search(name) and not _IS_OTHER.search(name)
    }
    if rest and names:
        hook = functools.partial(_warn_of_masks, rest[0], names, set())
        rest[0].handles.append(model.register_forward_pre_hook(hook, with_kwargs=True))


def _note_tokens_first(model: nn.Module, pools: Collection[TokenPool]) -> None:
    """Note which FFNs have torch's attention that takes (tokens, batch, D) nearest to them."""
    attention = attention_of(model) if pools else set()
    for module in model.modules():
        if beside := attention.intersection(module.children()):
            of_torch = [each for each in beside if isinstance(each, nn.MultiheadAttention)]
            tokens_first = any(not each.batch_first for each in of_torch)
            for pool in _inside(module, pools):
                pool.layout = Layout(tokens_first=tokens_first)


def _inside(module: nn.Module, pools: Iterable[TokenPool]) -> list[TokenPool]:
    modules = set(module.modules())
    return [pool for pool in pools if pool in modules]


def _is_of_transformers(module: nn.Module) -> bool:
    library: Any = sys.modules.get("transformers")  # who has a model of it has imported it
    return library is not None and isinstance(module, library.PreTrainedModel)


def _layout_in(model: Any, layout: Layout) -> Layout:
    """How a model of transformers has its tokens inside, beside what is known of one around it."""
    pads = any(name.startswith("_pad_to_") for name in dir(type(model)))  # to a window, or block
    tokens_first = model.config.model_type in _TOKENS_FIRST
    return Layout(layout.tokens_first or tokens_first, layout.pads or pads)


def _arguments_of(module: nn.Module) -> Mapping[str, int]:
    """The names of what the forward takes, and their places."""
    try:
        return {name: at for at, name in enumerate(inspect.signature(module.forward).parameters)}
    except (TypeError, ValueError):  # of C, or scripted
        return {}


def _given(name: str, position: int, args: Any, kwargs: Mapping[str, Any]) -> Any:
    return args[position] if position < len(args) else kwargs.get(name)


def _take_mask(
    pool: TokenPool,
    name: str,
    places: Mapping[str, int],
    module: nn.Module,
    args: Any,
    kwargs: dict[str, Any],
) -> None:
    if pool.has_given_mask:
        return
    mask = _given(name, places[name], args, kwargs)
    if mask is None and name == ATTENTION_MASK and INVERSE in places:
        padding = _given(INVERSE, places[INVERSE], args, kwargs)
        mask = None if padding is None else padding == 0
    if name != ATTENTION_MASK:
        if isinstance(mask, Tensor):
            mask = ~mask if mask.dtype == torch.bool else mask >= 0
    elif not (isinstance(mask, Tensor) and mask.ndim == 2):
        if mask is not None and (module.training or pool.pools_in_eval):
            _warn_of_pairs(module, mask)
        mask = None
    pool.remember("token_mask", mask)


def _warn_of_pairs(module: nn.Module, mask: Any) -> None:
    if torch.compiler.is_compiling():
        return
    kind = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    warnings.warn(
        f"The {ATTENTION_MASK} of {type(module).__name__} ({kind}) says what attends to what, not "
        "which tokens count, so all of them count for the routers, padding too. If there is "
        "padding, run the forward within exf.token_mask(model, mask), with a mask of (batch, "
        "tokens).",
        stacklevel=2,
    )


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
