"""Models of transformers and timm under MEO: which FFNs are causal, padding, caches."""

import copy
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from exfusion_param import meo
from exfusion_param.fusion.lookup import groups_of
from exfusion_testing.meo_models import with_random_gates

TEXT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert() -> Any:
    config = transformers.BertConfig(**TEXT, intermediate_size=32, hidden_dropout_prob=0.0)
    return transformers.BertForMaskedLM(config)


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        dropout=0.0,
    )
    return transformers.BartForConditionalGeneration(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=50,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=1,
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    config = transformers.LlamaConfig(**TEXT, intermediate_size=32, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def vit() -> Any:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=5
    )


CAUSAL = {
    bert: [False, False],
    t5: [False, False, True, True],
    bart: [False, False, True, True],
    gpt2: [True, True],
    llama: [True, True],
    vit: [False, False],
}


@pytest.mark.parametrize("make", CAUSAL)
def test_decoders_are_causal_by_themselves(make: Any) -> None:
    model = meo.wrap(make(), shared_gate=True, num_experts=3)
    causal = [weights.is_causal for weights in groups_of(model)]
    assert causal == CAUSAL[make]


def call(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    if model.config.is_encoder_decoder:
        logits: Tensor = model(
            input_ids=tokens, attention_mask=mask, decoder_input_ids=tokens[:, :4]
        ).logits
        return logits
    result: Tensor = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    return result


@pytest.mark.parametrize("make", [bert, t5, bart, gpt2, llama])
def test_models_of_transformers_train_and_padding_changes_nothing(make: Any) -> None:
    torch.manual_seed(0)
    model = with_random_gates(
        meo.wrap(make(), num_experts=4, top_k=2, segment_length=3, seed=0, expert_init="upcycle"),
        0.3,
    )
    tokens, mask = torch.randint(2, 50, (3, 8)), torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:] = 0
    loss = call(model.train(), tokens, mask).square().mean() + meo.balance_loss(model)
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "fusion_weights" in n)
    model.eval()
    junk = tokens.clone()
    junk[1, 5:] = 7
    with torch.no_grad():
        before, after = call(model, tokens, mask), call(model, junk, mask)
    part = slice(0, 4) if model.config.is_encoder_decoder else slice(0, 5)
    torch.testing.assert_close(after[1, part], before[1, part], rtol=0, atol=1e-5)


def test_a_cache_of_keys_and_values_is_refused_by_causal_models() -> None:
    torch.manual_seed(0)
    model = meo.wrap(gpt2(), num_experts=3).eval()
    tokens = torch.randint(2, 50, (1, 5))
    with pytest.raises(RuntimeError, match="use_cache=False"):
        model.generate(tokens, max_new_tokens=3, do_sample=False, use_cache=True)
    made = model.generate(tokens, max_new_tokens=3, do_sample=False, use_cache=False)
    assert made.shape[1] <= 8


@pytest.mark.parametrize("training", [False, True])
def test_a_mask_of_four_dimensions_warns_as_gates_pool_in_eval_too(training: bool) -> None:
    model = meo.wrap(bert(), num_experts=3).train(training)
    tokens, mask = torch.randint(2, 50, (2, 5)), torch.ones(2, 1, 5, 5, dtype=torch.bool)
    with pytest.warns(UserWarning, match="not which tokens count"):
        model(tokens, attention_mask=mask)


def test_pretrained_biases_are_kept() -> None:
    torch.manual_seed(0)
    plain = bert()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.1)
    tokens = torch.randint(2, 50, (2, 6))
    expected = plain.eval()(tokens).logits
    model = meo.wrap(copy.deepcopy(plain), expert_init="upcycle").eval()
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)


def test_a_vit_trains_and_its_state_loads() -> None:
    torch.manual_seed(0)
    model, other = meo.wrap(vit(), seed=0), meo.wrap(vit(), seed=1)
    x = torch.randn(2, 3, 32, 32)
    (model(x).square().mean() + meo.balance_loss(model)).backward()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(x), model.eval()(x), rtol=0, atol=0)


def test_a_type_that_runs_on_tokens_first_gates_each_sample() -> None:
    torch.manual_seed(0)
    config = transformers.XLNetConfig(
        vocab_size=50, d_model=16, n_layer=2, n_head=2, d_inner=32, dropout=0.0
    )
    model = meo.wrap(transformers.XLNetModel(config).double(), num_experts=4, causal=False)
    with_random_gates(model).eval()
    ids = torch.randint(0, 50, (3, 6))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1] * 6])
    y = model(ids, attention_mask=mask).last_hidden_state
    for ours, single in ((y[0], ids[:1]), (y[1, 2:], ids[1:2, 2:])):
        expected = model(single).last_hidden_state[0]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
