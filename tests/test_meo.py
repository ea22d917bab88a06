"""Merging Experts into One on models: what each level computes, tasks, padding, refusals."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import exfusion_param as exf
from exfusion_param import meo
from exfusion_param.finding.outer_modules import clean_name
from exfusion_testing.meo_models import (
    gate_of,
    plain_gates,
    plain_linear,
    with_random_gates,
    wrapped,
)
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.strategies import hidden_sizes, seeds, sizes


@given(
    dim=sizes,
    hidden=hidden_sizes,
    n=st.integers(2, 5),
    data=st.data(),
    batch=st.integers(1, 4),
    tokens=st.integers(1, 30),
    bias=st.booleans(),
    seed=seeds,
)
def test_each_sample_has_the_gated_sum_of_its_experts_outputs(
    dim: int,
    hidden: int,
    n: int,
    data: st.DataObject,
    batch: int,
    tokens: int,
    bias: bool,
    seed: int,
) -> None:
    k = data.draw(st.integers(1, n))
    model = FFNs(dim, hidden, depth=1, bias=bias).double()
    with_random_gates(meo.wrap(model, num_experts=n, top_k=k, seed=seed)).eval()
    x = inputs(dim, batch, tokens, seed)
    y = x
    for linear in (model.blocks[0].fc1, model.blocks[0].fc2):
        gates = plain_gates(gate_of(linear), y.mean(dim=1))
        stacks = linear.parametrizations
        outputs = torch.einsum("bti,noi->btno", y, stacks["weight"].original)
        if bias:
            outputs = outputs + stacks["bias"].original
        expected = torch.einsum("bn,btno->bto", gates, outputs)
        torch.testing.assert_close(linear(y), expected, rtol=0, atol=1e-9)
        y = expected


def test_the_defaults_are_the_papers() -> None:
    config = meo.MEOConfig()
    assert (config.num_experts, config.kept, config.level) == (8, 4, "sequence")
    assert config.balance_weight == 0.01
    model = meo.wrap(FFNs(128, 256))
    gates = {
        clean_name(name): p for name, p in model.named_parameters() if "fusion_weights" in name
    }
    assert len(gates) == 2 * 2 * 2  # a gate and its noise for each of two linears in two blocks
    assert not any(p.any() for p in gates.values())
    assert "8 experts" in str(exf.summarize(model))
    summary = exf.summarize(model)
    assert "MEO sequence, top 4" in str(summary)
    assert summary.shipped_parameters == sum(p.numel() for p in model.parameters())


def test_gradients_are_those_of_the_plain_twin() -> None:
    model = wrapped().eval()
    linear, x = model.blocks[0].fc1, inputs(4, 3, 30).requires_grad_()
    ours, theirs = linear(x), plain_linear(linear, x)
    wanted = [x, *linear.parameters()]
    wanted = [p for p in wanted if p is not gate_of(linear).noise]
    direction = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, wanted, direction),
        torch.autograd.grad(theirs, wanted, direction),
        rtol=0,
        atol=1e-9,
    )


def test_samples_do_not_depend_on_each_other() -> None:
    model = wrapped().eval()
    x = inputs(4, 5, 20)
    together = model(x)
    alone = torch.cat([model(sample) for sample in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_at_the_start_upcycled_experts_leave_the_function_as_it_was(level: Any) -> None:
    torch.manual_seed(0)
    dense = FFNs(64, 128).double()
    model = meo.wrap(copy.deepcopy(dense), level=level, expert_init="upcycle")
    x = inputs(64, 3, 20)
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), dense(x), rtol=0, atol=1e-12)


def test_a_token_goes_through_its_block_first() -> None:
    model = wrapped(64, 128, level="token").eval()
    linear, x = model.blocks[0].fc1, inputs(64, 2, 20)
    gate = gate_of(linear)
    (block,) = gate.blocks
    assert [tuple(p.shape) for p in block.parameters()] == [(1, 64), (64, 1)]
    moved = x + (x @ block.down.mT).relu() @ block.up.mT
    gates = plain_gates(gate, x.mean(dim=1))
    stacks = linear.parametrizations
    outputs = torch.einsum("bti,noi->btno", moved, stacks.weight.original) + stacks.bias.original
    torch.testing.assert_close(
        linear(x), torch.einsum("bn,btno->bto", gates, outputs), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_one_gate_can_serve_an_ffn(level: Any) -> None:
    model = wrapped(shared_gate=True, level=level).train()
    ffn = model.blocks[0]
    assert gate_of(ffn.fc1) is gate_of(ffn.fc2)
    torch.manual_seed(3)
    loss_of(model, inputs(4, 3, 9)).backward()
    assert len(gate_of(ffn.fc1).recorded) == 1
    assert gate_of(ffn.fc1).current is None
    model.eval()
    x = inputs(4, 3, 9)
    gates = plain_gates(gate_of(ffn.fc1), x.mean(dim=1))
    if level == "sequence":
        stacks = ffn.fc2.parametrizations
        hidden = ffn.act(ffn.fc1(x))
        gate_of(ffn.fc2).current = gates
        outputs = torch.einsum("bti,noi->btno", hidden, stacks.weight.original)
        expected = torch.einsum("bn,btno->bto", gates, outputs + stacks.bias.original)
        torch.testing.assert_close(ffn(x), expected, rtol=0, atol=1e-9)


def test_smear_merges_all_experts_on_the_normalised_mean() -> None:
    model = wrapped(gating="softmax", top_k=None).eval()
    linear, x = model.blocks[0].fc1, inputs(4, 3, 9)
    assert [name for name, _ in gate_of(linear).named_parameters()] == ["gate"]
    mean = x.mean(dim=1)
    normalised = (mean - mean.mean(1, keepdim=True)) / (
        mean.var(1, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    gates = (normalised @ gate_of(linear).gate.mT).softmax(dim=1)
    stacks = linear.parametrizations
    outputs = torch.einsum("bti,noi->btno", x, stacks.weight.original) + stacks.bias.original
    torch.testing.assert_close(
        linear(x), torch.einsum("bn,btno->bto", gates, outputs), rtol=0, atol=1e-9
    )
    trained, evaluated = model.train()(x), model.eval()(x)
    torch.testing.assert_close(trained, evaluated, rtol=0, atol=0)  # it has no noise


def test_noise_chooses_only_in_training() -> None:
    model, x = wrapped(), inputs(4, 3, 9)
    torch.testing.assert_close(model.eval()(x), model(x), rtol=0, atol=0)
    first, second = model.train()(x), model(x)
    assert (first - second).abs().max() > 1e-3
    torch.manual_seed(5)
    first = model(x)
    torch.manual_seed(5)
    torch.testing.assert_close(model(x), first, rtol=0, atol=0)


@given(st.permutations(range(5)))
def test_permuted_experts_with_their_gates_change_nothing(order: list[int]) -> None:
    model = wrapped().eval()
    x = inputs(4, 3, 9)
    before = model(x)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "parametrizations" in name:
                parameter.copy_(parameter[list(order)])
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(side: str, causal: bool) -> None:
    model = wrapped(causal=causal, segment_length=4).eval()
    x, junk = inputs(4, 3, 10), 100 * inputs(4, 3, 7, seed=1)
    left, right = {"left": (7, 0), "right": (0, 7), "both": (3, 4)}[side]
    padded = torch.cat([junk[:, :left], x, junk[:, 7 - right :]], dim=1)
    mask = torch.zeros(3, 17)
    mask[:, left : 17 - right] = 1
    with exf.token_mask(model, mask):
        y = model(padded)[:, left : 17 - right]
    torch.testing.assert_close(y, model(x), rtol=0, atol=1e-9)


def test_a_mask_finds_the_samples_of_tokens_in_one_dimension() -> None:
    model = wrapped().eval()
    x, mask = inputs(4, 3, 10), torch.ones(3, 10)
    with exf.token_mask(model, mask):
        flat = model(x.flatten(0, 1))
    torch.testing.assert_close(flat.view(3, 10, 3), model(x), rtol=0, atol=1e-12)


@given(
    length=st.integers(1, 7),
    tokens=st.integers(2, 20),
    data=st.data(),
    is_training=st.booleans(),
    shared=st.booleans(),
    level=st.sampled_from(["sequence", "token"]),
)
def test_later_tokens_never_change_earlier_outputs_of_causal_models(
    length: int, tokens: int, data: st.DataObject, is_training: bool, shared: bool, level: Any
) -> None:
    model = wrapped(causal=True, segment_length=length, shared_gate=shared, level=level)
    model.train(is_training)
    at = data.draw(st.integers(1, tokens - 1))
    x = inputs(4, 2, tokens)
    changed = torch.cat([x[:, :at], 10 * inputs(4, 2, tokens - at, seed=1)], dim=1)
    torch.manual_seed(0)
    before = model(x)
    torch.manual_seed(0)
    after = model(changed)
    torch.testing.assert_close(after[:, :at], before[:, :at], rtol=0, atol=1e-9)
    assert not torch.equal(after, before)


def test_a_segment_is_merged_by_the_mean_of_the_one_before() -> None:
    model = wrapped(causal=True, segment_length=4).eval()
    linear, x = model.blocks[0].fc1, inputs(4, 2, 11)
    gate, stacks = gate_of(linear), linear.parametrizations
    pooled = [x[:, 0], x[:, :4].mean(1), x[:, 4:8].mean(1)]
    outputs = torch.einsum("bti,noi->btno", x, stacks.weight.original) + stacks.bias.original
    parts = [
        torch.einsum("bn,btno->bto", plain_gates(gate, p), part)
        for p, part in zip(pooled, outputs.split(4, dim=1), strict=True)
    ]
    torch.testing.assert_close(linear(x), torch.cat(parts, dim=1), rtol=0, atol=1e-9)


def test_the_gate_of_the_first_segment_sends_no_gradient_into_the_tokens() -> None:
    model = wrapped(causal=True, segment_length=20).eval()
    linear = model.blocks[0].fc1
    x = inputs(4, 2, 11).requires_grad_()
    (ours,) = torch.autograd.grad(linear(x).sum(), x)
    gates = plain_gates(gate_of(linear), x[:, 0]).detach()
    weights = torch.einsum("bn,noi->boi", gates, linear.parametrizations.weight.original)
    expected = weights.sum(1, keepdim=True).expand_as(x)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


def test_layers_that_read_weights_of_their_own_take_the_slow_path() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    with_random_gates(meo.wrap(model, num_experts=4, causal=False))
    x = inputs(8, 3, 9)
    expected = model.eval()(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_torch_layers_say_which_dimension_runs_over_samples() -> None:
    torch.manual_seed(0)
    first = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).double()
    second = nn.TransformerEncoderLayer(8, 2, 16, batch_first=False, dropout=0.0).double()
    second.load_state_dict(first.state_dict())
    for layer in (first, second):
        with_random_gates(meo.wrap(layer, num_experts=4, seed=0))
    x = inputs(8, 3, 9)
    torch.testing.assert_close(
        second.eval()(x.transpose(0, 1)).transpose(0, 1), first.eval()(x), rtol=0, atol=1e-9
    )


def test_an_image_is_a_sample_of_its_pixels() -> None:
    torch.manual_seed(0)
    ffn = nn.Sequential(nn.Conv2d(4, 6, 1), nn.GELU(), nn.Conv2d(6, 4, 1)).double()
    with_random_gates(meo.wrap(ffn, num_experts=3, seed=0, filter_fn=["0", "2"])).eval()
    linear = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)).double()
    meo.wrap(linear, num_experts=3, seed=0, filter_fn=["0", "2"]).eval()
    state = {
        name: value.reshape(linear.state_dict()[name].shape)
        for name, value in ffn.state_dict().items()
    }
    linear.load_state_dict(state)
    x = inputs(4, 2, 15).view(2, 3, 5, 4)
    y = ffn(x.movedim(-1, 1))
    torch.testing.assert_close(y.movedim(1, -1), linear(x), rtol=0, atol=1e-9)


def test_empty_batches_pass() -> None:
    model = wrapped().train()
    y = model(torch.zeros(0, 5, 4).double())
    assert y.shape == (0, 5, 3)
    (y.sum() + meo.balance_loss(model)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
