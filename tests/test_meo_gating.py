"""Noisy top-k gating and its balance loss, against the definitions written out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exfusion_param.meo.gating import noisy_top_k, softmax_gates, squared_variation
from exfusion_testing.meo_models import gate_of, wrapped


def logits(batch: int, n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, generator=generator, dtype=torch.float64)


@given(st.integers(1, 5), st.integers(2, 8), st.data(), st.integers(0, 2**31))
def test_gates_are_a_softmax_over_the_k_largest(
    batch: int, n: int, data: st.DataObject, seed: int
) -> None:
    k = data.draw(st.integers(1, n))
    values = logits(batch, n, seed)
    gates = noisy_top_k(values, k)
    for row, gate in zip(values, gates.gates, strict=True):
        kept = row.argsort(descending=True)[:k]
        expected = torch.zeros_like(row)
        expected[kept] = row[kept].softmax(0)
        torch.testing.assert_close(gate, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gates.load, (gates.gates > 0).double().sum(0), rtol=0, atol=0)


@given(st.integers(2, 8), st.integers(0, 2**31))
def test_all_experts_without_noise_are_the_full_softmax(n: int, seed: int) -> None:
    values = logits(3, n, seed)
    torch.testing.assert_close(noisy_top_k(values, n).gates, values.softmax(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(softmax_gates(values).gates, values.softmax(1), rtol=0, atol=0)


def test_the_load_is_the_probability_of_being_kept_if_the_noise_is_drawn_again() -> None:
    torch.manual_seed(0)
    values, deviation = logits(1, 5, 3), torch.rand(1, 5, dtype=torch.float64) + 0.2
    state = torch.get_rng_state()
    gates = noisy_top_k(values, 2, deviation)
    torch.set_rng_state(state)
    noisy = values + torch.randn_like(values) * deviation
    assert set((gates.gates[0] > 0).nonzero().flatten().tolist()) == set(
        noisy[0].topk(2).indices.tolist()
    )
    draws = torch.randn(100_000, dtype=torch.float64)
    for i in range(5):
        others = torch.cat([noisy[0, :i], noisy[0, i + 1 :]])
        again = values[0, i] + draws * deviation[0, i]
        kept = (again > others.topk(2).values[-1]).double().mean()
        assert gates.load[i].item() == pytest.approx(kept.item(), abs=5 * 0.5 / math.sqrt(100_000))


def test_the_noise_has_the_deviation_that_it_is_given() -> None:
    torch.manual_seed(0)
    values = torch.zeros(20_000, 2, dtype=torch.float64)
    deviation = torch.tensor([2.0, 0.5]).double().expand(20_000, 2)
    gates = noisy_top_k(values, 2, deviation).gates
    difference = gates[:, 0].log() - gates[:, 1].log()
    assert difference.std().item() == pytest.approx(math.hypot(2.0, 0.5), rel=0.03)


def test_the_variation_is_that_of_the_published_code() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0], [0.0, 0.0, 0.0]]).double()
    expected = torch.tensor(
        [7.0 / 9.0, 0.0, 0.0], dtype=torch.float64
    )  # the unbiased variance is 7, mean 3
    torch.testing.assert_close(squared_variation(values), expected, rtol=0, atol=1e-9)


@given(st.integers(2, 6), st.data(), st.integers(0, 2**31))
def test_permuted_experts_get_permuted_gates(n: int, data: st.DataObject, seed: int) -> None:
    k, order = data.draw(st.integers(1, n)), torch.tensor(data.draw(st.permutations(range(n))))
    values = logits(4, n, seed)
    torch.testing.assert_close(
        noisy_top_k(values[:, order], k).gates, noisy_top_k(values, k).gates[:, order]
    )


@pytest.mark.parametrize("k", [1, 2, 4])
def test_load_and_gates_send_finite_gradients_for_vanishing_noise(k: int) -> None:
    values = torch.zeros(3, 4, requires_grad=True)
    deviation = torch.zeros(3, 4, requires_grad=True)
    gates = noisy_top_k(values, k, deviation)
    (gates.gates.square().sum() + gates.load.sum()).backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()
    assert gates.load.isfinite().all()


def test_the_deviation_of_a_gates_noise_is_the_softplus_of_its_logits() -> None:
    gate = gate_of(wrapped(num_experts=5, top_k=2).blocks[0].fc1)
    (pooled,) = torch.randn(1, 7, 4, dtype=torch.float64)
    deviation = (1 + (pooled @ gate.noise.mT).exp()).log()
    torch.manual_seed(0)
    expected = noisy_top_k(pooled @ gate.gate.mT, 2, deviation)
    torch.manual_seed(0)
    chosen = gate.choose(pooled, is_noisy=True)
    torch.testing.assert_close(chosen.gates, expected.gates, rtol=0, atol=1e-12)
    torch.testing.assert_close(chosen.load, expected.load, rtol=0, atol=1e-12)
