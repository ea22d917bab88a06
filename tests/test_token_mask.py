"""Padding has no vote in a router's pooling."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_param.tensors import functional
from exfusion_testing.families import BERT, T5
from exfusion_testing.models import FFNs, inputs
from exfusion_testing.strategies import num_experts, seeds, sizes

LENGTHS = [6, 3]
IDS = torch.arange(2, 14).view(2, 6)
MASK = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).long()


@given(n=num_experts, d=sizes, batch=sizes, tokens=sizes, seed=seeds, data=st.data())
def test_masked_tokens_do_not_count_and_none_left_counts_all(
    n: int, d: int, batch: int, tokens: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, d, generator=generator, dtype=torch.float64)
    router = torch.randn(n, d, generator=generator, dtype=torch.float64)
    flags = data.draw(st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens))
    mask = torch.tensor(flags).view(batch, tokens)
    routed = functional.route(x, router, mask)
    kept = x[mask] if mask.any() else x
    torch.testing.assert_close(routed, functional.route(kept, router), rtol=0, atol=1e-14)
    assert torch.equal(functional.route(x, router, mask.long()), routed)


def moves_of(model: nn.Module, forward: Callable[[], Any]) -> dict[str, Tensor]:
    """Every bank after one step of training."""
    model.train()
    forward().square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    return {name: bank.clone() for name, bank in model.named_buffers() if name.endswith("bank")}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, bank in ours.items():
        torch.testing.assert_close(bank, theirs[name], rtol=0, atol=1e-10)


def test_a_mask_in_a_context_leaves_padding_out_and_is_gone_after_it() -> None:
    model = exf.wrap(FFNs().double(), momentum=0.0)
    unpadded, plain = copy.deepcopy(model), copy.deepcopy(model)
    x = inputs(batch=1, tokens=6)
    mask = torch.arange(6)[None] < 4
    with exf.token_mask(model, mask):
        masked = moves_of(model, lambda: model(x))
    assert_same(masked, moves_of(unpadded, lambda: unpadded(x[:, :4])))
    for either in (model, plain):
        either.zero_grad()
    assert_same(moves_of(model, lambda: model(x)), moves_of(plain, lambda: plain(x)))


def test_a_mask_of_other_tokens_is_not_applied_and_contexts_nest() -> None:
    model = exf.wrap(FFNs(depth=1))
    bank = model.blocks[0].fc1.parametrizations.weight[0].fusion_weights
    outer, inner = torch.ones(1, 3), torch.ones(1, 99)
    with exf.token_mask(model, outer):
        with exf.token_mask(model, inner):
            assert bank.token_mask is inner
            model(inputs().float())
        assert bank.token_mask is outer
    assert bank.token_mask is None


def test_a_model_without_a_bank_is_refused() -> None:
    model, mask = exf.wrap(FFNs(), variant="dw"), torch.ones(1, 1)
    with pytest.raises(ValueError, match="FFNs has no router"), exf.token_mask(model, mask):
        pass


def make(name: str, **arguments: Any) -> nn.Module:
    config = transformers.AutoConfig.for_model(name, **arguments)
    for field in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate"):
        if hasattr(config, field):
            setattr(config, field, 0.0)
    model = transformers.AutoModel.from_config(config).double()
    return exf.wrap(model, momentum=0.0, seed=0)


@pytest.mark.parametrize("positional", [True, False])
def test_bert_counts_the_tokens_of_its_attention_mask(positional: bool) -> None:
    model = make("bert", **BERT)
    unpadded = copy.deepcopy(model)
    arguments: dict[str, Any] = {} if positional else {"attention_mask": MASK[1:]}
    extra = (MASK[1:],) if positional else ()
    masked = moves_of(model, lambda: model(IDS[1:], *extra, **arguments).last_hidden_state[:, :3])
    assert_same(masked, moves_of(unpadded, lambda: unpadded(IDS[1:, :3]).last_hidden_state))


def test_a_mask_of_pairs_warns_and_leaves_the_choice_to_the_context() -> None:
    model = make("bert", **BERT)
    padded, all_tokens = copy.deepcopy(model), copy.deepcopy(model)
    expected = moves_of(padded, lambda: padded(IDS, MASK)[0])
    pairs = MASK[:, None, None].double().log().expand(-1, 1, 6, 6)
    with pytest.warns(UserWarning, match="which tokens count"):
        counted = moves_of(all_tokens, lambda: all_tokens(IDS, pairs)[0])
    with exf.token_mask(model, MASK):
        assert_same(moves_of(model, lambda: model(IDS, pairs)[0]), expected)
    first = next(iter(expected))
    assert not torch.allclose(counted[first], expected[first])


def test_a_forward_without_a_mask_counts_all_tokens_again() -> None:
    model = make("bert", **BERT)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        model(IDS, attention_mask=MASK)
    forwards = [lambda m=m: m(IDS).last_hidden_state for m in (model, plain)]
    assert_same(moves_of(model, forwards[0]), moves_of(plain, forwards[1]))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_of_transformers_keeps_the_mask(use_reentrant: bool) -> None:
    model = make("bert", **BERT)
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    ours, theirs = (
        moves_of(m, lambda m=m: m(IDS, attention_mask=MASK).last_hidden_state)
        for m in (checkpointed, model)
    )
    assert_same(ours, theirs)
    gradients = [{n: p.grad for n, p in m.named_parameters()} for m in (checkpointed, model)]
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=0, atol=1e-12)


def test_encoder_and_decoder_of_t5_follow_masks_of_their_own() -> None:
    model = make("t5", **T5)
    unpadded = copy.deepcopy(model)
    decoder_mask = torch.tensor([[1, 1, 0, 0]])
    masked = moves_of(
        model,
        lambda: model(
            input_ids=IDS[1:],
            attention_mask=MASK[1:],
            decoder_input_ids=IDS[:1, :4],
            decoder_attention_mask=decoder_mask,
        ).last_hidden_state[:, :2],
    )
    expected = moves_of(
        unpadded,
        lambda: unpadded(input_ids=IDS[1:, :3], decoder_input_ids=IDS[:1, :2]).last_hidden_state,
    )
    assert_same(masked, expected)


def test_copies_follow_masks_of_their_own_and_fuse_leaves_no_hook() -> None:
    model = make("bert", **BERT)
    replica = copy.deepcopy(model)
    with torch.no_grad():
        replica.train()(IDS, attention_mask=MASK)
    masks = {
        name: [m.token_mask for m in either.modules() if hasattr(m, "token_mask")]
        for name, either in (("model", model), ("replica", replica))
    }
    assert all(mask is None for mask in masks["model"])
    assert all(mask is MASK for mask in masks["replica"])
    assert replica._forward_pre_hooks
    for either in (model, replica):
        with pytest.warns(UserWarning, match="still zero"):
            exf.fuse(either)
        assert not any(module._forward_pre_hooks for module in either.modules())
