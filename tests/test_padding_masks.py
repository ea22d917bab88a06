"""Masks of padding of models that are not transformers'."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_testing.banks import bank_after

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IS_PADDING = torch.tensor([[False, False, False, False, True, True]] * 2)
ADDITIVE = torch.zeros(2, 6).double().masked_fill(IS_PADDING, -torch.inf)


class Handing(nn.Module):
    """A model that hands its mask on, under another name, and ends with a class token."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        return self.encoder(x, None, pad)[..., :4, :]


def layer(**fields: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, **{"batch_first": True} | fields)


def decoder_layer() -> nn.TransformerDecoderLayer:
    return nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True)


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(layer(), 2)


def wrapped(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return exf.wrap(model.double(), momentum=0.0, bank_init="uniform", seed=0).train()


Call = Callable[[nn.Module, Tensor, Tensor | None], Tensor]
FOLLOWED: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    "layer": (layer, lambda m, x, pad: m(x, src_key_padding_mask=pad)),
    "encoder": (encoder, lambda m, x, pad: m(x, None, pad)),
    "decoder": (
        lambda: nn.TransformerDecoder(decoder_layer(), 1),
        lambda m, x, pad: m(x, X[:, :3], tgt_key_padding_mask=pad),
    ),
    "target": (
        lambda: nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True),
        lambda m, x, pad: m(X[:, :6], x, tgt_key_padding_mask=pad),
    ),
    "source": (
        lambda: nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True),
        lambda m, x, pad: m(x, X, src_key_padding_mask=pad, memory_key_padding_mask=pad),
    ),
    "handed on": (lambda: Handing(encoder()), lambda m, x, pad: m(x, pad)),
}


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("mask", [IS_PADDING, ADDITIVE], ids=["bool", "additive"])
@pytest.mark.filterwarnings("error:.*(router|token mask)")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_routers_follow_torchs_masks_of_padding(name: str, mask: Tensor) -> None:
    make, call = FOLLOWED[name]
    model = wrapped(make())
    unpadded = copy.deepcopy(model)
    loss = call(model, X, mask)
    ours = bank_after(model, loss if name == "source" else loss[:, :4])
    theirs = bank_after(unpadded, call(unpadded, X[:, :4], None))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_tokens_first_and_a_forward_without_a_mask_after_one_with() -> None:
    model = wrapped(layer(batch_first=False))
    unpadded = copy.deepcopy(model)
    ours = bank_after(model, model(X.transpose(0, 1), src_key_padding_mask=IS_PADDING)[:4])
    torch.testing.assert_close(ours, bank_after(unpadded, unpadded(X[:, :4].transpose(0, 1))))
    again = bank_after(model, model(X.transpose(0, 1)))
    torch.testing.assert_close(again, bank_after(unpadded, unpadded(X.transpose(0, 1))))


def test_a_given_token_mask_comes_first_and_fuse_leaves_no_hook() -> None:
    model = wrapped(encoder())
    unpadded = copy.deepcopy(model)
    with exf.token_mask(model, torch.ones(2, 6)):
        ours = bank_after(model, model(X, src_key_padding_mask=IS_PADDING))
    assert not torch.allclose(ours[0], bank_after(unpadded, unpadded(X[:, :4]))[0])
    exf.fuse(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        return self.mlp(x)


MEANT = {
    "attention_mask": ~IS_PADDING,
    "lengths": torch.tensor([6, 4]),
    "mask": IS_PADDING,
}
NOT_MEANT = {
    "attention_mask": torch.ones(2, 6),
    "lengths": torch.tensor([6, 6]),
    "mask": torch.ones(6, 6).tril(),
    "attn_mask": IS_PADDING,
}


@pytest.mark.parametrize("name", MEANT)
@pytest.mark.parametrize("is_positional", [True, False])
def test_a_mask_whose_meaning_is_unknown_warns_once(name: str, is_positional: bool) -> None:
    model = wrapped(Masked())
    at = ["attention_mask", "lengths", "mask"].index(name)
    args = (*(None,) * at, MEANT[name]) if is_positional else ()
    kwargs = {} if is_positional else {name: MEANT[name]}
    with pytest.warns(UserWarning, match=f"Masked is called with '{name}', .* exf.token_mask"):
        model(X, *args, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X, *args, **kwargs)


@pytest.mark.filterwarnings("error")
def test_masks_that_mark_no_padding_or_are_given_do_not_warn() -> None:
    model = wrapped(Masked())
    for name, mask in NOT_MEANT.items():
        model(X, **{name: mask})
    with exf.token_mask(model, ~IS_PADDING):
        model(X, attention_mask=~IS_PADDING)
    model.eval()(X, attention_mask=~IS_PADDING)
    exf.wrap(Masked(), variant="sw").train()(X.float(), attention_mask=~IS_PADDING)


REFUSED = [ADDITIVE, torch.tensor([6, 4]), torch.full((2, 6), torch.nan)]


@pytest.mark.parametrize("mask", REFUSED, ids=["additive", "lengths", "nan"])
def test_a_token_mask_of_other_values_is_refused_with_the_way_out(mask: Tensor) -> None:
    model = wrapped(Masked())
    with pytest.raises(ValueError, match="1 .* where a token counts"), exf.token_mask(model, mask):
        pass
    with exf.token_mask(model, ADDITIVE == 0):
        ways = [bank_after(model, model(X))]
    with exf.token_mask(model, torch.arange(6) < torch.tensor([4, 4])[:, None]):
        ways.append(bank_after(model, model(X)))
    assert torch.equal(ways[0][0], ways[1][0])
    not_a_tensor: Any = [[1, 1]]
    with pytest.raises(TypeError, match="got list"), exf.token_mask(model, not_a_tensor):
        pass


@pytest.mark.parametrize(
    ("layout", "fuse_on"),
    [(torch.jagged, "forward"), (torch.jagged, "step"), (torch.strided, "forward")],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_every_token_of_a_nested_tensor_counts(layout: torch.layout, fuse_on: Any) -> None:
    model = Masked().double()
    exf.wrap(model, momentum=0.0, seed=0, fuse_on=fuse_on).train()
    flat = copy.deepcopy(model)
    nested = torch.nested.nested_tensor([X[0], X[1, :3]], layout=layout)
    output = torch.cat(model(nested).unbind())
    expected = flat(torch.cat([X[0], X[1, :3]]))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(bank_after(model, output), bank_after(flat, expected))
