"""The FFNs that are known, as data: the names of their linears, family by family.

A shape names the linears that read the FFN's input and the one that writes its output, relative to
the module that holds them. It fits where all of them are there and their features fit: D to H, and
H back to D, with H > D / 2: what is narrower is an adapter, a gate or squeeze-and-excitation. An
FFN whose first linear makes gate and value in one has 2 H there.
"""

from __future__ import annotations

import dataclasses
import re

from torch import nn


@dataclasses.dataclass(frozen=True)
class FFNShape:
    """Names of the linears of an FFN, relative to the module that holds it.

    Args:
        inputs: those that read the FFN's input, in the order in which they run.
        output: the one that writes its output.
        holder: a pattern for the class name of that module, for names that others use too.
    """

    inputs: tuple[str, ...]
    output: str
    holder: re.Pattern[str] = re.compile("")


FFN_SHAPES = (
    # timm: ViT, DeiT, Swin, PVTv2, BEiT, EVA, CaiT, XCiT, Mixer, TNT, Twins, MaxViT, ConvNeXt;
    # transformers: ViT, Swin, SegFormer, CLIP, Whisper, BART, OPT, Phi
    FFNShape(("fc1",), "fc2", re.compile(r"^(?!SEModule|SqueezeExcit)")),
    FFNShape(("fc1_g", "fc1_x"), "fc2"),  # timm: SwiGLU of EVA-02, DINOv3, AIMv2
    FFNShape(("w0", "w1"), "w2"),  # timm: ViTamin
    FFNShape(("conv1",), "conv3", re.compile("^SpatialMlp$")),  # timm: Visformer
    FFNShape(("linear1",), "linear2"),  # torch.nn's Transformer layers
    FFNShape(("linear0",), "linear1", re.compile("^ModuleDict$")),  # FT-Transformer
    FFNShape(("0",), "3", re.compile("^MLP(Block)?$")),  # torchvision: ViT, Swin
    FFNShape(("intermediate.dense",), "output.dense"),  # BERT, RoBERTa, ELECTRA, DeBERTa
    FFNShape(("lin1",), "lin2"),  # DistilBERT
    FFNShape(("ffn",), "ffn_output"),  # ALBERT
    FFNShape(("wi",), "wo"),  # T5 v1.0
    FFNShape(("wi_0", "wi_1"), "wo"),  # T5 v1.1
    FFNShape(("c_fc",), "c_proj"),  # GPT-2, GPT-Neo
    FFNShape(("fc_in",), "fc_out"),  # GPT-J, CodeGen
    FFNShape(("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, BLOOM, Falcon
    FFNShape(("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma, DINOv2 giant
    FFNShape(("gate_up_proj",), "down_proj"),  # Phi-3, GLM
    FFNShape(("up_proj",), "down_proj"),  # MPT, Nemotron
    FFNShape(("gate_proj",), "down_proj"),  # TimesFM
    FFNShape(("w1", "w3"), "w2"),  # Llama as published
    FFNShape(("w12",), "w3"),  # DINOv2 as published
    FFNShape(("dense1",), "dense2"),  # PVT, PVTv2
    FFNShape(("pwconv1",), "pwconv2"),  # ConvNeXt, and SwiftFormer's encoders
    FFNShape(("point_wise_conv1",), "point_wise_conv2"),
    FFNShape(("conv1",), "conv2", re.compile("^PoolFormerOutput$")),
    FFNShape(("key",), "value"),  # RWKV's mixing of channels
)

FFN_NAME = re.compile(r"mlp|ffn|feed_?forward|(^|_)ff(_|$)|swiglu|geglu", re.IGNORECASE)
"""Names of modules and classes that are an FFN, or contain one."""

OTHER_NAME = re.compile(
    r"merger|projector|predictor|projection$|adapt[eo]r|router|classifier|^head$|Head$|bias"
    r"|embed(ding|der)?s?$|(^|_)(rel|pos|time)(_|$)",
    re.IGNORECASE,
)
"""Names of modules and classes that map D to H and back to D, but are not an FFN."""


def class_name(module: nn.Module) -> str:
    """The name of a module's class."""
    return type(module).__name__
