"""What is not finite is found at the step that made it; extreme numbers are none of that."""

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, distributed, nn

import exfusion_param as exf
from exfusion_param.fusion.lookup import groups_of
from exfusion_param.tensors import functional
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.ranks import on_ranks

MODES = ["forward", "step"]
NAN, INF = float("nan"), float("inf")


def wrapped(fuse_on: Any, variant: Any = "mb", **fields: Any) -> Any:
    torch.manual_seed(0)
    settings = {"num_experts": 3, "bank_init": "uniform"} | fields
    return exf.wrap(FFNs().double(), fuse_on=fuse_on, variant=variant, **settings)


def banks(model: nn.Module) -> list[Tensor]:
    return [weights.bank.clone() for weights in groups_of(model)]  # type: ignore[operator, union-attr]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    loss_of(model, x).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("fuse_on", MODES)
def test_a_batch_of_nan_is_found_at_its_step_and_moves_no_bank(fuse_on: str, value: float) -> None:
    model = wrapped(fuse_on)
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.1), lr=0.01)
    step(model, optimizer, inputs())
    before = banks(model)
    with pytest.raises(RuntimeError, match=r"2 FFN groups \('blocks.0' first\) became NaN or inf"):
        step(model, optimizer, torch.full_like(inputs(), value))
    for bank, old in zip(banks(model), before, strict=True):
        assert torch.equal(bank, old)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("variant", ["dw", "mb"])
@pytest.mark.parametrize("fuse_on", MODES)
def test_gradients_that_are_not_finite_are_found_in_the_group_that_has_them(
    fuse_on: str, variant: str, value: float
) -> None:
    model = wrapped(fuse_on, variant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss_of(model, inputs()).backward()
    weights = list(groups_of(model))[1]
    for parameter in [*weights.parameters(), *weights.trained()]:
        if parameter.grad is not None:
            parameter.grad.fill_(value)
    with pytest.raises(RuntimeError, match=r"1 FFN groups \('blocks.1' first\)"):
        optimizer.step()
    if variant == "mb":  # of the other group it moves
        assert torch.equal(weights.bank, torch.full_like(weights.bank, 1 / 3))  # type: ignore[arg-type]


@pytest.mark.parametrize("fuse_on", MODES)
def test_a_step_that_a_scaler_skips_is_no_fault(fuse_on: str) -> None:
    model = wrapped(fuse_on)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for optimizer in (
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.optim.AdamW(model.parameters(), lr=0.1, fused=True),
    ):
        before = [p.clone() for p in model.parameters()]
        scaler.scale(loss_of(model, torch.full_like(inputs(), NAN))).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        for parameter, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter, old)


@pytest.mark.parametrize("fuse_on", MODES)
def test_a_collapsed_router_and_dead_experts_warn_once(fuse_on: str) -> None:
    model = wrapped(fuse_on, momentum=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    first = next(iter(groups_of(model)))
    with torch.no_grad():
        first.router.zero_()[:2] = torch.tensor([[1000.0], [-1000.0]])  # type: ignore[operator, union-attr]
    said = []
    for _ in range(20):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(model, optimizer, torch.ones_like(inputs()))
        said += [str(warning.message) for warning in caught]
    assert len(said) == 2, said
    assert "router of 'blocks.0' has collapsed: expert" in said[0]
    assert "of 'blocks.0' is dead" in said[1]


def test_a_healthy_run_warns_of_nothing() -> None:
    model = wrapped("step", bank_init="zeros", num_experts=128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(5):
        step(model, optimizer, inputs(seed=seed))


@given(
    exponent=st.integers(-30, 30),
    tokens=st.integers(0, 3),
    experts=st.sampled_from([2, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    equal=st.booleans(),
)
def test_routers_take_any_finite_input(
    exponent: int, tokens: int, experts: int, dtype: torch.dtype, equal: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, 8, generator=generator).to(dtype) * 10.0**exponent
    router = torch.randn(experts, 8, generator=generator)
    weights = functional.route(x, torch.ones_like(router) if equal else router)
    if tokens == 0:
        return  # has no mean, and the bank asks for none
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    if equal:
        torch.testing.assert_close(weights, torch.full((experts,), 1 / experts))


@given(exponent=st.integers(-44, 37), experts=st.sampled_from([2, 128]))
def test_fusing_takes_denormal_and_huge_experts(exponent: int, experts: int) -> None:
    stack = torch.full((experts, 3, 2), 10.0**exponent)
    fused = functional.fuse(stack, torch.full((experts,), 1 / experts))
    smallest = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
    torch.testing.assert_close(fused, stack[0], rtol=1e-5, atol=experts * smallest)


@pytest.mark.parametrize("fuse_on", MODES)
@pytest.mark.parametrize("shape", [(1, 1, 4), (0, 3, 4)])
def test_batches_of_one_token_and_of_none(fuse_on: str, shape: tuple[int, ...]) -> None:
    model = wrapped(fuse_on)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = banks(model)
    x = torch.ones(shape, dtype=torch.float64)
    model(x).sum().backward()
    optimizer.step()
    moved = any(not torch.equal(a, b) for a, b in zip(banks(model), before, strict=True))
    assert moved == (0 not in shape)


def with_a_nan_on_one(rank: int, fuse_on: str) -> str:
    model = wrapped(fuse_on)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = inputs(seed=rank)
    with pytest.raises(RuntimeError, match="became NaN or inf") as caught:
        step(ddp, optimizer, x * NAN if rank == 1 else x)
    assert distributed.get_world_size() == 2
    assert all(bank.isfinite().all() for bank in banks(model))
    return str(caught.value)


@pytest.mark.processes
def test_every_rank_hears_of_a_nan_on_one() -> None:
    for fuse_on in MODES:
        assert len(set(on_ranks(2, with_a_nan_on_one, fuse_on))) == 1
