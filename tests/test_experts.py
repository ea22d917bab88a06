"""How expert stacks start."""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import exfusion_param as exf
from exfusion_param.tensors import functional
from exfusion_param.tensors.expert_starts import (
    independent_experts,
    named_generator,
    upcycled_experts,
)
from exfusion_testing.experts import expert_stacks
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.strategies import num_experts, seeds, sizes

CPU = torch.device("cpu")


OF_ANY_SHAPE = ["normal_", "uniform_", "trunc_normal_", "zeros_", "ones_"]
OF_MATRICES = ["orthogonal_", "eye_"]
MATRIX, *OTHER_SHAPES = [(20, 30), (20, 30, 1, 1), (600,)]


@pytest.mark.parametrize(
    ("init", "shape"),
    [*product([*OF_ANY_SHAPE, *OF_MATRICES], [MATRIX]), *product(OF_ANY_SHAPE, OTHER_SHAPES)],
)
def test_independent_experts_have_the_entries_and_the_spectrum_of_the_first(
    init: str, shape: tuple[int, ...]
) -> None:
    tensor = getattr(torch.nn.init, init)(torch.empty(shape, dtype=torch.float64))
    experts = independent_experts(tensor, 4)
    assert torch.equal(experts[0], tensor)
    is_constant = init in ("zeros_", "ones_")
    for expert in experts[1:]:
        assert torch.equal(expert.flatten().sort().values, tensor.flatten().sort().values)
        assert torch.equal(expert, tensor) == is_constant
        if len(shape) == 2:
            values = torch.linalg.svdvals(expert)
            torch.testing.assert_close(values, torch.linalg.svdvals(tensor), rtol=0, atol=1e-12)


def test_experts_move_along_rows_and_columns() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    expert = independent_experts(tensor, 2)[1]
    assert torch.equal(expert.sum(0).sort().values, tensor.sum(0))
    assert torch.equal(expert.sum(1).sort().values, tensor.sum(1))


@pytest.mark.parametrize("init", ["normal_", "uniform_", "orthogonal_", "eye_", "sparse_"])
def test_independent_experts_are_uncorrelated_and_average_out(init: str) -> None:
    arguments = {"sparsity": 0.9} if init == "sparse_" else {}
    tensor = getattr(torch.nn.init, init)(torch.empty(200, 300), **arguments)
    stacks = [independent_experts(tensor, 4) for _ in range(5)]
    for experts in stacks:
        correlation = torch.corrcoef(experts.flatten(1)) - torch.eye(4)
        assert correlation.abs().max() < 0.03
    shares = [experts.mean(0).var() / tensor.var() for experts in stacks]
    assert torch.stack(shares).mean().item() == pytest.approx(1 / 4, rel=0.03)


def test_the_experts_of_each_tensor_are_in_an_order_of_their_own() -> None:
    model = FFNs(dim=6, hidden=6)
    with torch.no_grad():
        for linear in (model.blocks[0].fc1, model.blocks[0].fc2, model.blocks[1].fc1):
            linear.weight.copy_(torch.arange(36.0).view(6, 6))
    exf.wrap(model, variant="sw", seed=0)
    stacks = [
        linear.parametrizations.weight.original[1:]
        for linear in (model.blocks[0].fc1, model.blocks[0].fc2, model.blocks[1].fc1)
    ]
    experts = torch.cat(stacks).flatten(1)
    assert len(experts.unique(dim=0)) == 9


def test_experts_of_a_bfloat16_tensor_and_of_one_on_the_meta_device() -> None:
    tensor = torch.randn(6, 4).bfloat16()
    generator = torch.Generator().manual_seed(3)
    experts = independent_experts(tensor, 3, generator)
    assert experts.dtype == torch.bfloat16
    assert torch.equal(experts, independent_experts(tensor, 3, generator.manual_seed(3)))
    assert independent_experts(tensor.to("meta"), 3).shape == (3, 6, 4)


@given(n=num_experts, shape=st.lists(sizes, min_size=1, max_size=2), seed=seeds)
def test_upcycled_experts_fuse_to_the_tensor_whatever_the_weights(
    n: int, shape: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
    weights = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    experts = upcycled_experts(tensor, weights, 0.5, generator)
    torch.testing.assert_close(functional.fuse(experts, weights), tensor, rtol=0, atol=1e-13)


@pytest.mark.parametrize("n", [2, 4, 16])
@pytest.mark.parametrize("equal", [True, False])
def test_upcycling_noise_has_the_deviation_that_is_asked_for(n: int, equal: bool) -> None:
    tensor = 3 * torch.randn(200, 300)
    weights = torch.full((n,), 1 / n) if equal else torch.softmax(torch.randn(n), dim=0)
    noise = upcycled_experts(tensor, weights, 0.1) - tensor
    assert noise.square().mean().sqrt().item() == pytest.approx(0.3, rel=0.02)
    torch.testing.assert_close(upcycled_experts(tensor, weights, 0.0), tensor.expand(n, -1, -1))


@pytest.mark.parametrize("fuse_on", ["forward", "step"])
@pytest.mark.parametrize("n", [2, 4])
def test_wrapping_adds_the_noise_that_the_config_says(fuse_on: Any, n: int) -> None:
    model = FFNs(dim=40, hidden=80, depth=1)
    weight = model.blocks[0].fc1.weight.detach().clone()
    fields = {"variant": "dw", "expert_init": "upcycle", "upcycle_noise": 0.5, "num_experts": n}
    exf.wrap(model, fuse_on=fuse_on, seed=0, **fields)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss_of(model, inputs(40).float()).backward()
    optimizer.step()
    experts = expert_stacks(model, optimizer)["blocks.0.fc1.weight"]
    noise = (experts - weight).std().item() / weight.std().item()
    assert noise == pytest.approx(0.5, rel=0.03)


def test_draws_depend_only_on_the_seed_and_the_name() -> None:
    def drawn(seed: int, name: str) -> torch.Tensor:
        return torch.rand(3, generator=named_generator(seed, name, CPU))

    assert torch.equal(drawn(0, "a"), drawn(0, "a"))
    assert not torch.equal(drawn(0, "a"), drawn(0, "b"))
    assert not torch.equal(drawn(0, "a"), drawn(1, "a"))
    drawn(-(2**40), "any int is a seed")
