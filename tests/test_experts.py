"""How expert stacks start."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exfusion_param.tensors import functional
from exfusion_param.tensors.expert_starts import (
    independent_experts,
    named_generator,
    upcycled_experts,
)
from exfusion_testing.strategies import num_experts, seeds, sizes

CPU = torch.device("cpu")


@pytest.mark.parametrize("init", ["normal_", "uniform_", "trunc_normal_", "zeros_", "ones_"])
def test_independent_experts_match_the_mean_and_deviation_of_the_first(init: str) -> None:
    tensor = getattr(torch.nn.init, init)(torch.empty(200, 300))
    experts = independent_experts(tensor, 4)
    assert torch.equal(experts[0], tensor)
    deviation = tensor.std().item()
    for expert in experts[1:]:
        # the mean of 60,000 draws strays by 0.004 deviations, their deviation by a little less
        assert expert.mean().item() == pytest.approx(tensor.mean().item(), abs=0.02 * deviation)
        assert expert.std().item() == pytest.approx(deviation, rel=0.02)
        assert expert.min() >= tensor.min()
        assert expert.max() <= tensor.max()


def test_independent_experts_are_uncorrelated() -> None:
    experts = independent_experts(torch.randn(200, 300), 4).flatten(1)
    correlation = torch.corrcoef(experts) - torch.eye(4)
    assert correlation.abs().max() < 0.02


@given(n=num_experts, shape=st.lists(sizes, min_size=1, max_size=2), seed=seeds)
def test_upcycled_experts_fuse_to_the_tensor_whatever_the_weights(
    n: int, shape: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
    weights = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    experts = upcycled_experts(tensor, weights, 0.5, generator)
    torch.testing.assert_close(functional.fuse(experts, weights), tensor, rtol=0, atol=1e-13)


def test_upcycling_noise_has_the_deviation_that_is_asked_for() -> None:
    tensor = 3 * torch.randn(200, 300)
    noise = upcycled_experts(tensor, torch.full((4,), 0.25), 0.1) - tensor
    # taking the mean of four away leaves sqrt(3/4) of the deviation
    assert noise.std().item() == pytest.approx(0.3 * 0.75**0.5, rel=0.02)
    copies = upcycled_experts(tensor, torch.full((4,), 0.25), 0.0)
    torch.testing.assert_close(copies, tensor.expand(4, -1, -1))


def test_draws_depend_on_the_seed_and_the_name_alone() -> None:
    def drawn(seed: int, name: str) -> torch.Tensor:
        return torch.rand(3, generator=named_generator(seed, name, CPU))

    assert torch.equal(drawn(0, "a"), drawn(0, "a"))
    assert not torch.equal(drawn(0, "a"), drawn(0, "b"))
    assert not torch.equal(drawn(0, "a"), drawn(1, "a"))
    drawn(-(2**40), "any int is a seed")
