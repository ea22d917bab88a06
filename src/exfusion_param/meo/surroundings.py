"""Tells what tokens an FFN gets by the modules around it: causal or not, batched or not."""

from __future__ import annotations

from torch import nn

from ..finding.discovery import parents_of

_TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_CAUSAL = ("is_causal", "is_decoder")


def is_causal(model: nn.Module, ffn: str) -> bool:
    """Whether the FFN of a model must not see later tokens, as the attention beside it.

    Attention modules of transformers say so in `is_causal` or `is_decoder`, others by their name or
    that of the model. torch's `nn.TransformerDecoderLayer` is made for masks that hide later ones.
    """
    for parent in _around(model, ffn):
        if isinstance(parent, nn.TransformerDecoderLayer):
            return True
        said = [module for module in parent.modules() if _speaks(module)]
        if said:
            return any(_says_causal(module) for module in said)
    return any(word in type(model).__name__ for word in ("CausalLM", "LMHead"))


def is_in_torch_layer(model: nn.Module, ffn: str) -> bool:
    """Whether the FFN is of one of torch's layers, which take single samples, shape (T, D), too."""
    return any(isinstance(parent, _TORCH_LAYERS) for parent in _around(model, ffn))


def _around(model: nn.Module, name: str) -> list[nn.Module]:
    """A module of the model and all that hold it, from the inside."""
    return [model.get_submodule(each) for each in (name, *parents_of(name))]


def _speaks(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    is_attention = "attention" in name or "attn" in name
    return is_attention and ("causal" in name or any(hasattr(module, flag) for flag in _CAUSAL))


def _says_causal(module: nn.Module) -> bool:
    is_named_so = "causal" in type(module).__name__.lower()
    return is_named_so or any(getattr(module, flag, False) is True for flag in _CAUSAL)
