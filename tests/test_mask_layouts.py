"""Token masks for layers whose layout of tokens differs from the caller's."""

import contextlib
import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_param import meo
from exfusion_testing.banks import bank_after
from exfusion_testing.meo_models import with_random_gates

SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
BART: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": SMALL,
    "roberta": SMALL | {"pad_token_id": 1},
    "xlnet": {"vocab_size": 32, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24},
    "longformer": SMALL | {"attention_window": [4], "pad_token_id": 1},
    "big_bird": SMALL | {"attention_type": "original_full"},
    "llama": SMALL | {"num_key_value_heads": 2},
    "electra": SMALL | {"embedding_size": 16},
    "distilbert": {"vocab_size": 32, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24},
}
MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
IDS = torch.arange(2, 14).view(2, 6)


def make(name: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **fields)
    for field in vars(config):
        if "dropout" in field and isinstance(getattr(config, field), float):
            setattr(config, field, 0.0)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").double()
    return exf.wrap(model, momentum=0.0, seed=0).train()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("error:A token mask")
def test_banks_of_a_padded_batch_are_those_without_padding(name: str) -> None:
    """Both samples by itself are what the batch is, weighted by their tokens: 3 and 6."""
    fields = FAMILIES[name]
    models = [make(name, **fields) for _ in range(3)]
    batch = bank_after(models[0], models[0](IDS, attention_mask=MASK)[0])
    short = bank_after(models[1], models[1](IDS[:1, :3], attention_mask=MASK[:1, :3])[0])
    long = bank_after(models[2], models[2](IDS[1:], attention_mask=MASK[1:])[0])
    for ours, three, six in zip(batch, short, long, strict=True):
        torch.testing.assert_close(ours, (three + 2 * six) / 3, rtol=0, atol=1e-9)


def test_xlnets_input_mask_is_the_inverse_of_an_attention_mask() -> None:
    moved = []
    for mask in ({"attention_mask": MASK}, {"input_mask": 1 - MASK}, {"input_mask": MASK == 0}, {}):
        model = make("xlnet", **FAMILIES["xlnet"])
        moved.append(bank_after(model, model(IDS, **mask)[0]))
    torch.testing.assert_close(moved[1], moved[0], rtol=0, atol=0)
    torch.testing.assert_close(moved[2], moved[0], rtol=0, atol=0)
    assert not torch.allclose(moved[3][0], moved[0][0])


def test_square_masks_of_layers_with_tokens_first_are_transposed() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0).double()
    model = exf.wrap(layer, momentum=0.0, seed=0).train()
    flipped = copy.deepcopy(model)
    flipped.self_attn.batch_first = True
    for pool in flipped.modules():
        if hasattr(pool, "layout"):
            pool.layout = type(pool.layout)()
    x, mask = torch.randn(3, 3, 8).double(), torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    with exf.token_mask(model, mask):
        ours = bank_after(model, model(x, src_key_padding_mask=mask == 0))
    with exf.token_mask(flipped, mask):
        theirs = bank_after(flipped, flipped(x.transpose(0, 1), src_key_padding_mask=mask == 0))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tokens_first", [False, True])
def test_masks_of_torchs_layers_leave_padding_out(tokens_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=not tokens_first)
    model = exf.wrap(layer.double(), momentum=0.0, seed=0).train()
    alone = copy.deepcopy(model)
    x, mask = torch.randn(2, 5, 8).double(), torch.tensor([[1, 1, 1, 0, 0]] * 2)
    turned = (lambda y: y.transpose(0, 1)) if tokens_first else (lambda y: y)
    with exf.token_mask(model, mask):
        ours = bank_after(model, model(turned(x), src_key_padding_mask=mask == 0))
    theirs = bank_after(alone, alone(turned(x[:, :3])))
    torch.testing.assert_close(ours, theirs)


def test_a_mask_that_does_not_fit_warns_and_one_without_padding_does_not() -> None:
    model = make("bert", **SMALL | {"chunk_size_feed_forward": 2})
    with pytest.warns(UserWarning, match=r"mask of shape \(2, 6\) does not fit .* \(2, 2, 16\)"):
        model(IDS, attention_mask=MASK)
    model(IDS, attention_mask=torch.ones_like(MASK))


def test_tokens_in_several_dimensions_or_in_one_follow_the_mask() -> None:
    x, mask = torch.randn(2, 6, 8), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    moved = []
    for shape in ((2, 6, 8), (2, 2, 3, 8), (12, 8)):
        torch.manual_seed(0)
        model = exf.wrap(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), momentum=0.0, seed=0)
        with exf.token_mask(model, mask):
            moved.append(bank_after(model, model(x.reshape(shape))))
    torch.testing.assert_close(moved[1], moved[0])
    torch.testing.assert_close(moved[2], moved[0])


@pytest.mark.parametrize("fuse_on", ["forward", "step"])
@pytest.mark.parametrize("tokens_first", [False, True])
def test_a_stride_reads_every_so_many_tokens_of_each_sample(
    fuse_on: Any, tokens_first: bool
) -> None:
    fields: Any = {"momentum": 0.0, "seed": 0, "fuse_on": fuse_on, "token_stride": 2}
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=not tokens_first)
    model = exf.wrap(layer.double(), **fields).train()
    x, mask = torch.randn(2, 5, 8).double(), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    seen: list[Tensor] = []
    model.linear1.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    router = next(p for name, p in model.named_parameters() if name.endswith("router")).detach()
    with exf.token_mask(model, mask):
        (bank,) = bank_after(model, model(x.transpose(0, 1) if tokens_first else x))
    tokens = seen[0].transpose(0, 1) if tokens_first else seen[0]
    kept = torch.stack([*tokens[0, [0, 2, 4]], tokens[1, 0]])
    shares = (kept @ router.T).softmax(dim=-1).mean(dim=0)
    torch.testing.assert_close(bank, shares, rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", [2, 6])  # as many samples as tokens, too
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("by_context", [False, True])
@pytest.mark.parametrize("fields", [{"gating": "softmax"}, {"shared_gate": True, "causal": True}])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_padding_changes_nothing_in_torchs_encoders_under_meo(
    fields: Any, by_context: bool, batch_first: bool, batch: int
) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer.double(), 2)
    model = with_random_gates(meo.wrap(model, num_experts=4, seed=0, **fields)).eval()
    x, mask = torch.randn(batch, 6, 8, dtype=torch.float64), torch.ones(batch, 6, dtype=torch.bool)
    mask[0, 4:] = False

    def run(x: Tensor) -> Tensor:
        with exf.token_mask(model, mask) if by_context else contextlib.nullcontext():
            y = model(x if batch_first else x.transpose(0, 1), src_key_padding_mask=~mask)
        return y if batch_first else y.transpose(0, 1)

    expected = run(x)
    junk = x.clone()
    junk[~mask] = 7.0
    torch.testing.assert_close(run(junk)[mask], expected[mask], rtol=0, atol=1e-12)
    single = x[0, :4] if batch_first else x[0, :4].unsqueeze(1)
    alone = model(single).reshape(4, 8)
    torch.testing.assert_close(expected[0, :4], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", [exf.wrap, meo.wrap])
def test_the_padding_mask_of_one_sample_without_a_batch_is_followed(method: Any) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    model = method(nn.TransformerEncoder(layer, 2), seed=0)
    if method is meo.wrap:
        with_random_gates(model).eval()
    x, padding = torch.randn(6, 8, dtype=torch.float64), torch.arange(6) >= 4
    expected = model(x, src_key_padding_mask=padding)
    junk = torch.where(padding.unsqueeze(1), 7.0, x)
    actual = model(junk, src_key_padding_mask=padding)
    torch.testing.assert_close(actual[:4], expected[:4], rtol=0, atol=1e-12)
