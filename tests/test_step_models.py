"""Public models under `fuse_on="step"`: dense outside, experts as under "forward" inside."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import exfusion_param as exf
from exfusion_testing.step_models import EXACT, VARIANTS, assert_same, fusion_weights, wrap


def vit() -> tuple[nn.Module, Tensor]:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=2, num_heads=2, num_classes=3
    )
    return model, torch.randn(2, 3, 32, 32).double()


def bert() -> tuple[nn.Module, Tensor]:
    config = BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config), torch.arange(10).view(2, 5)


def llama() -> tuple[nn.Module, Tensor]:
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    return LlamaModel(config), torch.arange(10).view(2, 5)


def encoder() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return model, torch.randn(2, 3, 8).double()


class Lines(nn.Module):
    """A Sequential FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.ffn(x))


def sequential() -> tuple[nn.Module, Tensor]:
    return Lines(), torch.randn(5, 8).double()


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "timm's ViT": vit,
    "BERT": bert,
    "Llama, gated": llama,
    "nn.TransformerEncoder": encoder,
    "Sequential": sequential,
}


def built(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    return model.double(), x


def loss(model: Any, x: Tensor) -> Tensor:
    y = model(x)
    y = y if isinstance(y, Tensor) else y.last_hidden_state
    return (y.square() + y.sin()).mean()


def train(model: Any, x: Tensor, steps: int = 4) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, x).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("variant", EXACT)
@pytest.mark.parametrize("name", MODELS)
def test_a_public_model_trains_as_under_forward(variant: str, name: str) -> None:
    dense, x = built(name)
    model = wrap(copy.deepcopy(dense), variant)
    twin = exf.wrap(dense, variant=variant, seed=1, fuse_on="forward")
    with torch.no_grad():
        for mine, its in zip(fusion_weights(model), fusion_weights(twin), strict=True):
            for fused, stack in zip(mine.fused, its.expert_stacks(), strict=True):
                stack.copy_(fused.experts())
    for each in (model, twin):
        train(each, x)
    assert_same(dict(exf.fused_state_dict(model)), dict(exf.fused_state_dict(twin)), 1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "nn.TransformerEncoder"])
def test_a_public_model_is_shipped_dense_under_its_own_keys(variant: str, name: str) -> None:
    model, x = built(name)
    keys = list(model.state_dict())
    wrap(model, variant)
    train(model, x)
    with torch.no_grad():
        before = loss(model.eval(), x)
        assert list(exf.fuse(model).state_dict()) == keys
        assert torch.equal(loss(model, x), before)
