"""The blocks that FSDP2 gathers one at a time, in models of several libraries."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    MobileBertConfig,
    MobileBertModel,
    T5Config,
    T5ForConditionalGeneration,
)

import exfusion_param as exf
from exfusion_param.sharding.transformer_blocks import transformer_blocks
from exfusion_testing.ranks import on_threads
from exfusion_testing.sharded import assert_same, mesh_of, whole_state

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*view tensor:UserWarning")

TINY = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}


def t5() -> nn.Module:
    config = T5Config(
        d_model=8,
        d_kv=4,
        num_heads=2,
        d_ff=12,
        num_layers=2,
        vocab_size=20,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def swin() -> nn.Module:
    sizes: dict[str, Any] = {"embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)}
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, patch_size=2, **sizes
    )


def levit() -> nn.Module:
    return timm.create_model("levit_128s")


def mobilebert() -> nn.Module:
    sizes = {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2}
    return MobileBertModel(MobileBertConfig(num_hidden_layers=2, **(TINY | sizes)))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


class Conformer(nn.Module):
    """A block with an FFN before attention and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn1, self.attention, self.ffn2 = mlp(), nn.Linear(4, 4), mlp()


MODELS = {
    "ViT": (
        lambda: timm.create_model("vit_tiny_patch16_224", depth=2),
        ["blocks.0", "blocks.1"],
    ),
    "Swin": (swin, [f"layers.{i}.blocks.{j}" for i in (0, 1) for j in (0, 1)]),
    "T5": (t5, [f"{part}.block.{i}" for part in ("encoder", "decoder") for i in (0, 1)]),
    "BERT": (
        lambda: BertModel(BertConfig(num_hidden_layers=2, **TINY)),
        ["encoder.layer.0", "encoder.layer.1"],
    ),
    "torch": (encoder, ["layers.0", "layers.1", "layers.2"]),
    "two FFNs in a block": (
        lambda: nn.Sequential(Conformer(), nn.ModuleDict({"last": Conformer()})),
        ["0", "1.last"],
    ),
    "one block": (lambda: nn.ModuleDict({"h": nn.ModuleList([Conformer()])}), ["h.0"]),
    "blocks that are lists": (
        lambda: nn.ModuleList(nn.ModuleList([nn.Linear(4, 4), mlp()]) for _ in range(2)),
        ["0.1", "1.1"],
    ),
    "one FFN": (mlp, []),
    # FFNs within a block that are elements themselves: one block, not one within another
    "LeViT": (levit, ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1", "stages.2"]),
    "MobileBERT": (mobilebert, ["encoder.layer.0", "encoder.layer.1"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_blocks_of(name: str) -> None:
    make, expected = MODELS[name]
    model = exf.wrap(make(), variant="sw")
    names = {module: fqn for fqn, module in model.named_modules()}
    assert [names[block] for block in transformer_blocks(model)] == expected


def train(model: nn.Module, batches: list[torch.Tensor]) -> None:
    optimizer = torch.optim.SGD(exf.param_groups(model, 0.1), lr=0.1, momentum=0.9)
    for batch in batches:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def sharded(rank: int, wrapped: nn.Module, batches: list[torch.Tensor]) -> Any:
    model = exf.fully_shard(copy.deepcopy(wrapped), mesh=mesh_of(3))
    train(model, [batch.chunk(3)[rank] for batch in batches])
    return whole_state(model)


@pytest.mark.parametrize("fuse_on", ["step", "forward"])
def test_t5_with_tied_embeddings_on_three_ranks_equals_one(fuse_on: Any) -> None:
    torch.manual_seed(0)
    dense = t5().double()
    wrapped = exf.wrap(dense, fuse_on=fuse_on, bank_init="uniform", seed=0)
    batches = [torch.randint(1, 20, (6, 5)) for _ in range(3)]
    states = on_threads(3, sharded, wrapped, batches)
    train(wrapped, batches)
    assert_same(states, wrapped.state_dict(), atol=1e-7)  # T5's softmax is taken in float32
