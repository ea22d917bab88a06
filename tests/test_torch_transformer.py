"""torch.nn's Transformer layers, whose eval fast path reads weights without calling the linears."""

import copy

import pytest
import torch
from torch import Tensor, nn

import exfusion_param as exf

VARIANTS = ["sw", "dw", "mb"]


def encoder(norm_first: bool = False) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


def step(model: nn.Module, *inputs: Tensor) -> None:
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.01), lr=0.01)
    model(*inputs).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_eval_fast_path_equals_the_slow_path_and_the_fused_model(
    variant: str, norm_first: bool, padded: bool
) -> None:
    model = exf.wrap(encoder(norm_first), variant=variant)
    x = torch.randn(3, 5, 8)
    step(model, x)
    mask = torch.arange(5) >= torch.tensor([5, 3, 1])[:, None] if padded else None
    keep = ~mask if mask is not None else torch.ones(3, 5, dtype=torch.bool)
    model.eval()
    slow = model(x, src_key_padding_mask=mask)  # gradients are on
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=mask)
        fused = exf.fuse(copy.deepcopy(model))(x, src_key_padding_mask=mask)
    assert torch.equal(fast, fused)
    torch.testing.assert_close(fast[keep], slow[keep], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_encoder_and_decoder_train_and_fuse(variant: str) -> None:
    model = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True)
    keys = list(model.state_dict())
    exf.wrap(model, variant=variant)
    source, target = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    before = copy.deepcopy(model.state_dict())
    step(model, source, target)
    moved = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert moved == []  # every stack, fusion weight and bank
    model.eval()
    expected = model(source, target)
    torch.testing.assert_close(exf.fuse(model)(source, target), expected)
    assert list(model.state_dict()) == keys
