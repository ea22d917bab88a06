"""Linears with a weight for each sample: merged equals combined, in values and gradients."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from exfusion_param.meo import merging
from exfusion_param.meo.merging import combined_outputs, merged_linear, merged_weights
from exfusion_testing.strategies import seeds, sizes


def case(
    batch: int, tokens: int, n: int, out: int, features: int, kept: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gates = draw(batch, n).softmax(dim=1)
    smallest = gates.topk(n - kept, dim=1, largest=False).indices
    gates = gates.scatter(1, smallest, 0.0)
    return draw(batch, tokens, features), gates, draw(n, out, features), draw(n, out)


def looped(x: Tensor, gates: Tensor, experts: Tensor, bias: Tensor) -> Tensor:
    """Each sample, token and expert in turn."""
    return torch.stack(
        [
            torch.stack(
                [
                    sum((g * (e @ t + b) for g, e, b in zip(row, experts, bias, strict=True)))  # type: ignore[misc]
                    for t in sample
                ]
            )
            for row, sample in zip(gates, x, strict=True)
        ]
    )


@given(
    batch=st.integers(1, 4),
    tokens=st.integers(1, 40),
    n=st.integers(2, 9),
    out=sizes,
    features=sizes,
    data=st.data(),
    seed=seeds,
    chunk=st.sampled_from([1, 40, 1 << 20]),
    is_transposed=st.booleans(),
)
def test_merged_is_the_gated_sum_of_the_experts_outputs(
    batch: int,
    tokens: int,
    n: int,
    out: int,
    features: int,
    data: st.DataObject,
    seed: int,
    chunk: int,
    is_transposed: bool,
) -> None:
    kept = data.draw(st.integers(1, n))
    x, gates, experts, bias = case(batch, tokens, n, out, features, kept, seed)
    expected = looped(x, gates, experts, bias)
    if is_transposed:
        experts = experts.mT.contiguous()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(merging.TILE, "cpu", chunk)
        y = merged_linear(x, gates, experts, bias, kept=kept, is_transposed=is_transposed)
        patch.setattr(merging, "combines_outputs", lambda tokens, n: True)
        combined = merged_linear(x, gates, experts, bias, kept=kept, is_transposed=is_transposed)
        patch.setattr(merging, "combines_outputs", lambda tokens, n: False)
        merged = merged_linear(x, gates, experts, bias, kept=kept, is_transposed=is_transposed)
    for value in (y, combined, merged):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("way", [False, True])
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_gradients_and_second_derivatives(
    monkeypatch: pytest.MonkeyPatch, way: bool, is_transposed: bool, chunk: int
) -> None:
    monkeypatch.setattr(merging, "combines_outputs", lambda tokens, n: way)
    monkeypatch.setitem(merging.TILE, "cpu", chunk)
    x, gates, experts, bias = case(2, 3, 4, 3, 2, 4, 0)
    if is_transposed:
        experts = experts.mT.contiguous()
    leaves = [tensor.requires_grad_() for tensor in (x, gates, experts, bias)]

    def run(*tensors: Tensor) -> Tensor:
        return merged_linear(*tensors, kept=4, is_transposed=is_transposed)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(monkeypatch: pytest.MonkeyPatch, frozen: int) -> None:
    monkeypatch.setattr(merging, "combines_outputs", lambda tokens, n: False)
    x, gates, experts, _ = case(2, 3, 4, 3, 2, 4, 0)
    leaves = [x, gates, experts]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i != frozen)
    merged_linear(x, gates, experts, kept=4).square().sum().backward()
    grads = [leaf.grad for leaf in leaves]
    assert grads[frozen] is None
    for leaf in leaves:
        leaf.grad = None
        leaf.requires_grad_()
    merged_linear(x, gates, experts, kept=4).square().sum().backward()
    for i, leaf in enumerate(leaves):
        if i != frozen:
            torch.testing.assert_close(grads[i], leaf.grad, rtol=0, atol=1e-12)


class _Largest(TorchDispatchMode):
    """The most numbers that any new tensor has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_new = all(returned.alias_info is None for returned in func._schema.returns)
        if isinstance(result, Tensor) and is_new:
            self.numel = max(self.numel, result.numel())
        return result


def test_no_tensor_has_a_weight_for_each_sample_and_expert(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(merging.TILE, "cpu", 2 * 32 * 32)
    x, gates, experts, bias = case(16, 64, 8, 32, 32, 4, 0)
    for tensor in (x, gates, experts, bias):
        tensor.requires_grad_()
    with _Largest() as largest:
        merged_linear(x, gates, experts, bias, kept=4).sum().backward()
    assert largest.numel == x.numel() < 16 * 8 * 32 * 32 / 2


def test_few_samples_copy_only_the_experts_that_they_keep() -> None:
    _, gates, experts, _ = case(1, 3, 32, 5, 4, 4, 0)
    with _Largest() as largest:
        few = merged_weights(gates, experts, 4)
    assert largest.numel <= 4 * 5 * 4
    torch.testing.assert_close(few, torch.einsum("bn,noi->boi", gates, experts), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_merges_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, gates, experts, bias = (t.to(torch.float32) for t in case(2, 30, 8, 16, 16, 8, 0))
    low = experts.to(dtype)
    seen = []
    plain = merging.merged_weights
    monkeypatch.setattr(
        merging, "merged_weights", lambda *args: seen.append(plain(*args)) or seen[-1]
    )
    y = merged_linear(x.to(dtype), gates, low, bias.to(dtype), kept=8)
    assert y.dtype == dtype
    assert seen[0].dtype == torch.float32
    expected = torch.einsum("bn,noi->boi", gates, low.float())
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-5)


def test_autocast_computes_in_its_dtype_and_merges_in_float32() -> None:
    x, gates, experts, bias = (t.to(torch.float32) for t in case(2, 30, 8, 16, 16, 8, 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = merged_linear(x, gates, experts, bias, kept=8)
    assert y.dtype == torch.bfloat16
    expected = merged_linear(x, gates, experts, bias, kept=8)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)


def test_combined_outputs_of_single_tokens_are_chosen_by_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    monkeypatch.setattr(
        merging, "combined_outputs", lambda *args: calls.append(1) or combined_outputs(*args)
    )
    x, gates, experts, bias = case(4, 1, 8, 5, 4, 4, 0)
    merged_linear(x, gates, experts, bias, kept=4)
    assert calls
    merged_linear(x.expand(4, 100, 4), gates, experts, bias, kept=4)
    assert len(calls) == 1
