"""Count the FFN groups that discovery finds in architectures of timm, transformers and torch.

    python tools/coverage.py > docs/coverage.md

The counts to expect are written down here from the architectures' definitions: the depths of their
stages as published, or the number of layers in a transformers config. Discovery has no part in
them. Models are built on the meta device, at full size.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import timm
import torch
import transformers
from torch import nn

from exfusion_param.finding.discovery import find_ffns

TIMM = {
    "vit_tiny_patch16_224": 12,
    "vit_base_patch16_siglip_224": 12 + 1,  # and the attention pool's
    "vit_relpos_small_patch16_224": 12,
    "deit_tiny_patch16_224": 12,
    "deit_tiny_distilled_patch16_224": 12,
    "deit3_small_patch16_224": 12,
    "swin_tiny_patch4_window7_224": 2 + 2 + 6 + 2,
    "swinv2_tiny_window8_256": 2 + 2 + 6 + 2,
    "pvt_v2_b0": 2 + 2 + 2 + 2,
    "beit_base_patch16_224": 12,
    "beitv2_base_patch16_224": 12,
    "eva02_tiny_patch14_224": 12,
    "eva02_base_patch14_224": 12,
    "eva_giant_patch14_224": 40,
    "cait_xxs24_224": 24 + 2,  # self-attention and class-attention blocks
    "xcit_nano_12_p16_224": 12 + 2,
    "mixer_s16_224": 8 * 2,  # over tokens and over channels
    "resmlp_12_224": 12,
    "gmlp_s16_224": 30,
    "tnt_s_legacy_patch16_224": 12 * 2,  # inner and outer
    "twins_pcpvt_small": 3 + 4 + 6 + 3,
    "twins_svt_small": 2 + 2 + 10 + 4,
    "maxvit_tiny_tf_224": (2 + 2 + 5 + 2) * 2,  # block and grid attention
    "coatnet_0_rw_224": 7 + 2,  # the attention stages
    "vit_small_patch14_dinov2": 12,
    "vit_giant_patch14_dinov2": 40,
    "vit_small_patch16_dinov3": 12,
    "vit_7b_patch16_dinov3": 40,
    "convnext_atto": 2 + 2 + 6 + 2,
    "convnextv2_atto": 2 + 2 + 6 + 2,
    "poolformer_s12": 2 + 2 + 6 + 2,
    "crossvit_tiny_240": 3 * (1 + 4),  # blocks of both branches; the fusions have none
    "davit_tiny": (1 + 1 + 3 + 1) * 2,  # spatial and channel attention
    "volo_d1_224": 4 + 4 + 8 + 2 + 2,
    "visformer_tiny": 7 + 4 + 4,
    "focalnet_tiny_srf": 2 + 2 + 6 + 2,
    "hiera_tiny_224": 1 + 2 + 7 + 2,
    "mvitv2_tiny": 1 + 2 + 5 + 2,
    "levit_128s": 2 + 3 + 4 + 2,  # and one after each of two downsamplings
    "coat_tiny": 2 * 4 + 6,
    "mobilevit_xxs": 2 + 4 + 3,
    "aimv2_large_patch14_224": 24,
    "vitamin_small_224": 14,
    "tiny_vit_5m_224": 2 + 6 + 2,
}


def _layers(config: Any) -> int:
    return config.num_hidden_layers


def _both(config: Any) -> int:
    return config.encoder_layers + config.decoder_layers


TRANSFORMERS: dict[str, Callable[[Any], int]] = {
    "bert": _layers,
    "roberta": _layers,
    "electra": _layers,
    "deberta-v2": _layers,
    "distilbert": lambda config: config.n_layers,
    "albert": lambda config: config.num_hidden_groups,  # one, which all layers run
    "modernbert": _layers,
    "xlnet": lambda config: config.n_layer,
    "t5": lambda config: config.num_layers + config.num_decoder_layers,
    "mt5": lambda config: config.num_layers + config.num_decoder_layers,  # v1.1: gated
    "bart": _both,
    "pegasus": _both,
    "whisper": _both,
    "gpt2": lambda config: config.n_layer,
    "gpt_neo": _layers,
    "gpt_neox": _layers,
    "gptj": lambda config: config.n_layer,
    "bloom": lambda config: config.n_layer,
    "falcon": _layers,
    "opt": _layers,
    "phi": _layers,
    "phi3": _layers,
    "llama": _layers,
    "mistral": _layers,
    "qwen2": _layers,
    "qwen3": _layers,
    "gemma": _layers,
    "mpt": lambda config: config.n_layers,
    "vit": _layers,
    "deit": _layers,
    "beit": _layers,
    "dinov2": _layers,
    "swin": lambda config: sum(config.depths),
    "swinv2": lambda config: sum(config.depths),
    "pvt": lambda config: sum(config.depths),
    "pvt_v2": lambda config: sum(config.depths),
    "segformer": lambda config: sum(config.depths),
    "convnext": lambda config: sum(config.depths),
    "poolformer": lambda config: sum(config.depths),
    "clip": lambda config: _layers(config.text_config) + _layers(config.vision_config),
    "wav2vec2": _layers,
}

GATED = {"vit_7b_patch16_dinov3", "aimv2_large_patch14_224", "vitamin_small_224"}
GATED |= {"eva02_base_patch14_224", "mt5", "llama", "mistral", "qwen2", "qwen3", "gemma"}


class Row(NamedTuple):
    """One architecture: its FFN groups and their linears, expected and found."""

    library: str
    name: str
    expected: int
    found: int
    expected_linears: int
    found_linears: int

    @property
    def is_covered(self) -> bool:
        """Whether nothing is missed, and nothing found that is not an FFN."""
        return self.expected == self.found and self.expected_linears == self.found_linears


def _row(library: str, name: str, expected: int, model: nn.Module) -> Row:
    groups = find_ffns(model)
    linears = expected * (3 if name in GATED else 2)
    return Row(library, name, expected, len(groups), linears, sum(len(g.linears) for g in groups))


def rows() -> Iterator[Row]:
    """Every architecture, built and searched."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with torch.device("meta"):
        for name, expected in TIMM.items():
            yield _row("timm", name, expected, timm.create_model(name))
        for name, count in TRANSFORMERS.items():
            config = transformers.AutoConfig.for_model(name)
            model = transformers.AutoModel.from_config(config)
            yield _row("transformers", name, count(config), model)


def table(found: list[Row]) -> str:
    """docs/coverage.md."""
    lines = [
        "# FFN groups that `wrap` finds by itself",
        "",
        "Written by `python tools/coverage.py > docs/coverage.md`; a test keeps it true. What to",
        "expect is counted from the definition of each architecture, see that file.",
        "",
        "| library | architecture | FFN groups expected | found | linears expected | found |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        cells = (row.library, f"`{row.name}`", *row[2:])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    covered = sum(row.is_covered for row in found)
    return "\n".join([*lines, "", f"{covered} of {len(found)} architectures are covered.", ""])


if __name__ == "__main__":
    print(table(list(rows())), end="")
