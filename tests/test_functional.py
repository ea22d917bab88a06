"""The mathematics: Eq. 7, 10, 11 and the facts that follow from them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exfusion_param.tensors import functional, sliced_sums
from exfusion_testing.strategies import momenta, num_experts, seeds, sizes

dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


def draw(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


@given(n=num_experts, out=sizes, features=sizes, tokens=sizes, has_bias=st.booleans(), seed=seeds)
def test_linear_with_fused_weight_is_weighted_sum_of_the_experts_outputs(
    n: int, out: int, features: int, tokens: int, has_bias: bool, seed: int
) -> None:
    e, b, w, x = draw(seed, (n, out, features), (n, out), (n,), (tokens, features))
    fused = torch.nn.functional.linear(
        x, functional.fuse(e, w), functional.fuse(b, w) if has_bias else None
    )
    outputs = [w[i] * (x @ e[i].T + (b[i] if has_bias else 0)) for i in range(n)]
    torch.testing.assert_close(fused, sum(outputs), rtol=1e-12, atol=1e-12)


@given(n=num_experts, shape=st.lists(sizes, max_size=3), dtype=dtypes, seed=seeds)
def test_fusing_rounds_once_in_any_dtype(
    n: int, shape: list[int], dtype: torch.dtype, seed: int
) -> None:
    (e,) = draw(seed, (n, *shape), dtype=dtype)
    (w,) = draw(seed, (n,), dtype=functional.accumulation_dtype(dtype))
    exact = torch.tensordot(w.double(), e.double(), dims=1)
    fused = functional.fuse(e, w)
    assert fused.dtype == dtype
    # half a unit in the last place for the cast, a few of the accumulator's for the sum
    bound = torch.finfo(dtype).eps / 2 * exact.abs()
    accumulator = torch.finfo(functional.accumulation_dtype(dtype)).eps
    bound += 2 * n * accumulator * torch.tensordot(w.double().abs(), e.double().abs(), dims=1)
    assert ((fused.double() - exact).abs() <= bound).all()


@given(n=num_experts, out=sizes, features=sizes, seed=seeds)
def test_gradients_are_multiples_of_the_dense_gradient(
    n: int, out: int, features: int, seed: int
) -> None:
    e, w, g = draw(seed, (n, out, features), (n,), (out, features))
    e.requires_grad_()
    w.requires_grad_()
    functional.fuse(e, w).backward(g)
    assert e.grad is not None
    assert w.grad is not None
    for i in range(n):
        torch.testing.assert_close(e.grad[i], w[i].detach() * g, rtol=0, atol=1e-14)
        expected = (e[i] * g).sum().detach()
        torch.testing.assert_close(w.grad[i], expected, rtol=0, atol=1e-12)


@given(n=num_experts, out=sizes, features=sizes, seed=seeds)
def test_gradcheck_and_second_derivatives(n: int, out: int, features: int, seed: int) -> None:
    e, w, x, router = draw(seed, (n, out, features), (n,), (2, 3, features), (n, features))
    tensors = [tensor.requires_grad_() for tensor in (e, w, x, router)]

    def ffn(e: Tensor, w: Tensor, x: Tensor, router: Tensor) -> Tensor:
        bank = functional.update_bank(w, functional.route(x, router), 0.5)
        return torch.nn.functional.linear(x, functional.fuse(e, bank))

    assert torch.autograd.gradcheck(ffn, tensors)
    assert torch.autograd.gradgradcheck(ffn, tensors)


@given(n=num_experts, out=sizes, features=sizes, seed=seeds, data=st.data())
def test_permuting_experts_with_their_weights_changes_nothing(
    n: int, out: int, features: int, seed: int, data: st.DataObject
) -> None:
    e, w = draw(seed, (n, out, features), (n,))
    order = data.draw(st.permutations(range(n)))
    torch.testing.assert_close(
        functional.fuse(e[order], w[order]), functional.fuse(e, w), rtol=0, atol=1e-14
    )


@given(n=num_experts, features=sizes, shape=st.lists(sizes, min_size=1, max_size=3), seed=seeds)
def test_routed_weights_are_the_mean_of_each_tokens_softmax(
    n: int, features: int, shape: list[int], seed: int
) -> None:
    x, router = draw(seed, (*shape, features), (n, features))
    tokens = x.reshape(-1, features)
    expected = torch.stack([torch.softmax(router @ token, 0) for token in tokens]).mean(0)
    routed = functional.route(x, router)
    torch.testing.assert_close(routed, expected, rtol=0, atol=1e-14)
    assert routed.sum().item() == pytest.approx(1, abs=1e-12)


@given(n=num_experts, momentum=momenta, steps=st.integers(1, 60))
def test_mass_of_a_bank_from_zeros_is_one_minus_momentum_to_the_step(
    n: int, momentum: float, steps: int
) -> None:
    bank = torch.zeros(n, dtype=torch.float64)
    for step in range(steps):
        (logits,) = draw(step, (n,))
        bank = functional.update_bank(bank, logits.softmax(0), momentum)
    assert bank.sum().item() == pytest.approx(1 - momentum**steps, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_kept_for_backward_but_experts_and_fusion_weights(dtype: torch.dtype) -> None:
    experts = torch.randn(4, 5, 6, dtype=dtype, requires_grad=True)
    weights = torch.rand(4, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        functional.fuse(experts, weights)
    assert {t.data_ptr() for t in kept} == {experts.data_ptr(), weights.data_ptr()}


@given(num_experts, sizes, st.integers(1, 30), st.sampled_from([torch.float64, torch.bfloat16]))
def test_slices_of_a_stack_make_the_same_sums(
    n: int, size: int, numbers: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    experts = torch.randn(n, size, size, dtype=dtype).requires_grad_()
    weights = torch.rand(n, dtype=torch.float64).requires_grad_()
    expected = torch.tensordot(weights, experts.double(), dims=1)
    of_experts, of_weights = torch.autograd.grad(expected.sum(), [experts, weights])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sliced_sums.SLICE, "cpu", numbers)
        fused = functional.fuse(experts, weights)
        gradients = torch.autograd.grad(fused.sum(), [experts, weights])
    tolerance = (
        {"rtol": 0, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-2}
    )
    torch.testing.assert_close(fused.double(), expected, **tolerance)
    torch.testing.assert_close(gradients[0], of_experts, **tolerance)
    torch.testing.assert_close(gradients[1], of_weights, **tolerance)


def test_autocast_does_not_lower_the_precision_of_the_sum() -> None:
    e, w, x, router = draw(0, (4, 16, 8), (4,), (2, 8), (4, 8), dtype=torch.float32)
    fused, routed = functional.fuse(e, w), functional.route(x, router)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(functional.fuse(e, w), fused)
        assert torch.equal(functional.route(x, router), routed)


def test_a_router_that_was_cast_routes_in_float32() -> None:
    x, router = torch.randn(500, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    expected = (x.double() @ router.double().T).softmax(-1).mean(0)
    weights = functional.route(x, router)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), expected, rtol=0, atol=1e-6)


def test_meta_tensors_fuse_to_meta_tensors() -> None:
    fused = functional.fuse(torch.empty(4, 3, 2, device="meta"), torch.ones(4, device="meta"))
    assert fused.is_meta
    assert fused.shape == (3, 2)


def test_second_derivatives_of_a_low_precision_stack_are_those_of_the_formula() -> None:
    """Of `<G_E, v> + <G_w, u>`, where `G_E = w G` and `G_w = <E, G>` are the first ones."""
    e, g, v = draw(0, (4, 3, 2), (3, 2), (4, 3, 2), dtype=torch.bfloat16)
    w, u = draw(1, (4,), (4,), dtype=torch.float32)
    leaves = [e.requires_grad_(), w.requires_grad_(), g.requires_grad_()]
    loss = (functional.fuse(e, w) * g).sum()
    of_e, of_w = torch.autograd.grad(loss, leaves[:2], create_graph=True)
    second = torch.autograd.grad((of_e * v).sum() + (of_w * u).sum(), leaves)
    e, g, v, w, u = (tensor.detach().double() for tensor in (e, g, v, w, u))
    expected = [
        torch.einsum("n,oi->noi", u, g),
        torch.einsum("noi,oi->n", v, g),
        torch.einsum("n,noi->oi", w, v) + torch.einsum("n,noi->oi", u, e),
    ]
    for ours, right in zip(second, expected, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("of_experts", "of_gradient", "of_products"),
    [
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
)
def test_products_are_as_exact_as_the_more_exact_of_experts_and_gradient(
    of_experts: torch.dtype, of_gradient: torch.dtype, of_products: torch.dtype
) -> None:
    e, g = draw(0, (4, 30, 20), (30, 20))
    e, g = e.to(of_experts), g.to(of_gradient)
    products = sliced_sums.products_with(e, g)
    assert products.dtype == of_products
    expected = torch.einsum("noi,oi->n", e.double(), g.double())
    tolerance = 1e-12 if of_products == torch.float64 else 1e-4
    torch.testing.assert_close(products.double(), expected, rtol=0, atol=tolerance)
