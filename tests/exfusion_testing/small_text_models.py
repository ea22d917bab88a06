"""Models of transformers' text types, small enough to train in a test."""

import logging
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

PADDING = 1  # id of the token

WIDTHS = ["hidden_size", "d_model", "dim", "n_embd", "emb_dim", "embedding_size", "d_embed"]
WIDTHS += ["word_embed_proj_dim", "input_embedding_size", "output_embedding_size"]
HIDDEN = ["intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "d_inner"]
HIDDEN += ["n_inner", "hidden_dim", "inner_dim", "ffn_hidden_size"]
HEADS = ["num_attention_heads", "n_heads", "n_head", "num_heads", "encoder_attention_heads"]
HEADS += ["decoder_attention_heads", "num_key_value_heads", "num_kv_heads"]
LAYERS = ["num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers"]
LAYERS += ["decoder_layers", "num_encoder_layers", "num_decoder_layers"]
SIZES = dict.fromkeys(WIDTHS, 16) | dict.fromkeys(HIDDEN, 24) | dict.fromkeys(HEADS + LAYERS, 2)
SIZES |= dict.fromkeys(["head_dim", "d_kv", "d_head", "rotary_dim"], 8)
SIZES |= {"vocab_size": 32, "pad_token_id": PADDING, "max_position_embeddings": 64}
WINDOWS = {"attention_window": [8, 8]}  # where one is all padding, gradients are NaN
TOKENS = ["bos_token_id", "eos_token_id", "decoder_start_token_id"]


def text_types() -> list[str]:
    """Every type that has a model of language."""
    named = ["CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM"]
    return sorted(
        {n for each in named for n in getattr(modeling_auto, f"MODEL_FOR_{each}_MAPPING_NAMES")}
    )


def build(name: str) -> nn.Module:
    """The model without a head, in float64, of two layers, without dropout.

    Raises:
        Exception: whatever transformers raises for a config with these sizes.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    default = transformers.AutoConfig.for_model(name)
    sizes = {f: size for f, size in SIZES.items() if isinstance(getattr(default, f, None), int)}
    sizes |= {field: value for field, value in WINDOWS.items() if hasattr(default, field)}
    config: Any = transformers.AutoConfig.for_model(name, **sizes)
    for field in TOKENS:
        if isinstance(getattr(config, field, None), int):
            setattr(config, field, 2)
    for field, value in list(vars(config).items()):
        if isinstance(value, float) and re.search("drop", field):
            setattr(config, field, 0.0)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    if sum(parameter.numel() for parameter in model.parameters()) > 10_000_000:
        raise ValueError(f"{name} has sizes that these fields do not set")
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model
