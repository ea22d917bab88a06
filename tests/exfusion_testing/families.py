"""Every family of models that `wrap` claims, small, with an input to run it on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn


class Family(NamedTuple):
    """How to make a model, and the arguments to call it with."""

    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]

    def run(self, model: nn.Module, dtype: torch.dtype) -> Tensor:
        """The model's output on the inputs, cast to a dtype."""
        inputs = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in self.inputs.items()
        }
        output = model(**inputs)
        if isinstance(output, Tensor):
            return output
        return output["logits_per_image" if "logits_per_image" in output else 0]


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
HIERARCHY = {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
TIMM: dict[str, tuple[str, dict[str, Any], int]] = {
    "ViT": ("vit_tiny_patch16_224", VIT, 32),
    "DeiT": ("deit_tiny_distilled_patch16_224", VIT, 32),
    "Swin": ("swin_tiny_patch4_window7_224", {"img_size": 32, **HIERARCHY}, 32),
    "SwinV2": ("swinv2_tiny_window8_256", {"img_size": 32, **HIERARCHY}, 32),
    "PVTv2": ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}, 64),
    "BEiT": ("beit_base_patch16_224", VIT, 32),
    "EVA-02": ("eva02_tiny_patch14_224", VIT, 32),
    "EVA-02 SwiGLU": ("eva02_base_patch14_224", VIT, 32),
    "CaiT": ("cait_xxs24_224", VIT, 32),
    "XCiT": ("xcit_nano_12_p16_224", VIT | {"patch_size": 16, "embed_dim": 32}, 32),
    "Mixer": ("mixer_s16_224", {"img_size": 32}, 32),
    "TNT": (
        "tnt_s_legacy_patch16_224",
        {"img_size": 32, "embed_dim": 24, "inner_dim": 8, "depth": 2, "num_heads_outer": 2},
        32,
    ),
    "Twins-PCPVT": ("twins_pcpvt_small", {"img_size": 64, "depths": (1, 1, 1, 1)}, 64),
    "Twins-SVT": ("twins_svt_small", {"img_size": 64, "depths": (1, 1, 1, 1)}, 64),
    "MaxViT": ("maxvit_rmlp_pico_rw_256", {"img_size": 64}, 64),
    "CoAtNet": ("coatnet_pico_rw_224", {"img_size": 64}, 64),
    "DINOv2": ("vit_small_patch14_dinov2", VIT, 32),
    "DINOv2 giant": ("vit_giant_patch14_dinov2", VIT, 32),
    "ConvNeXt": ("convnext_atto", {"depths": (1, 1, 1, 1)}, 32),
    "PoolFormer": ("poolformer_s12", {"layers": (1, 1, 1, 1)}, 32),
}

BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 64,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
IMAGE = BERT | {"image_size": 32, "patch_size": 8}
TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("bert", BERT),
    "RoBERTa": ("roberta", BERT),
    "DistilBERT": (
        "distilbert",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 64},
    ),
    "ALBERT": ("albert", BERT | {"embedding_size": 8}),
    "T5 v1.0": ("t5", T5),
    "T5 v1.1": ("t5", T5 | {"feed_forward_proj": "gated-gelu"}),
    "GPT-2": ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64}),
    "GPT-NeoX": ("gpt_neox", BERT),
    "Llama": ("llama", BERT | {"num_key_value_heads": 2}),
    "Mistral": ("mistral", BERT | {"num_key_value_heads": 2}),
    "Qwen": ("qwen2", BERT | {"num_key_value_heads": 2}),
}
VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "transformers ViT": ("vit", IMAGE),
    "transformers DeiT": ("deit", IMAGE),
    "transformers DINOv2": ("dinov2", IMAGE),
    "transformers Swin": ("swin", {"image_size": 32, "patch_size": 4, **HIERARCHY}),
    "PVT": ("pvt", {"image_size": 64, "depths": [1, 1, 1, 1]}),
    "SegFormer": ("segformer", {"depths": [1, 1, 1, 1]}),
}
CLIP = {"text_config": BERT, "vision_config": IMAGE, "projection_dim": 8}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_source_positions": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
}
IDS = torch.arange(2, 14).view(2, 6)


def _timm(name: str, arguments: dict[str, Any], size: int) -> Family:
    return Family(lambda: timm.create_model(name, **arguments), {"x": _noise(2, 3, size, size)})


def _transformers(name: str, arguments: dict[str, Any], **inputs: Tensor) -> Family:
    def make() -> nn.Module:
        config = transformers.AutoConfig.for_model(name, **arguments)
        return transformers.AutoModel.from_config(config)

    return Family(make, inputs)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _torch_transformer() -> nn.Module:
    return nn.Transformer(8, 2, 1, 1, 16, batch_first=True)


FAMILIES = {label: _timm(*spec) for label, spec in TIMM.items()}
FAMILIES |= {label: _transformers(*spec, input_ids=IDS) for label, spec in TEXT.items()}
for label in ("T5 v1.0", "T5 v1.1"):
    FAMILIES[label].inputs["decoder_input_ids"] = IDS[:, :3]
for label, (name, arguments) in VISION.items():
    size = arguments.get("image_size", 64)
    FAMILIES[label] = _transformers(name, arguments, pixel_values=_noise(2, 3, size, size))
FAMILIES |= {
    "CLIP": _transformers("clip", CLIP, input_ids=IDS, pixel_values=_noise(2, 3, 32, 32)),
    "Whisper": _transformers(
        "whisper", WHISPER, input_features=_noise(2, 80, 16), decoder_input_ids=IDS[:, :3]
    ),
    "torchvision ViT": Family(
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 24, 48),
        {"x": _noise(2, 3, 32, 32)},
    ),
    "torchvision Swin": Family(
        lambda: torchvision.models.SwinTransformer([4, 4], 12, [1, 1], [1, 2], [4, 4]),
        {"x": _noise(2, 3, 32, 32)},
    ),
    "torch.nn.Transformer": Family(
        _torch_transformer, {"src": _noise(2, 5, 8), "tgt": _noise(2, 4, 8)}
    ),
}
