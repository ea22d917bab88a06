"""Experts and optimizer states that are stored in bfloat16 or 8 bits."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_param.step.state_storage import round_stochastically
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.ranks import on_threads
from exfusion_testing.sharded import mesh_of, my_part, whole_state

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*view tensor:UserWarning")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range = range(3)) -> None:
    dtype = model.get_parameter("stem.weight").dtype
    for seed in seeds:
        x = inputs(model.get_submodule("stem").in_features, seed=seed).to(dtype)  # type: ignore[arg-type]
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()


SMALL = {"expert_dtype": torch.bfloat16}


def wrapped(dim: int = 32, hidden: int = 64, **fields: Any) -> Any:
    torch.manual_seed(0)
    fields = {"seed": 1, "bank_init": "uniform"} | fields
    return exf.wrap(FFNs(dim, hidden), fuse_on="step", **fields)


def state_of(optimizer: torch.optim.Optimizer, model: Any) -> dict[str, Tensor]:
    return optimizer.state[model.blocks[0].fc1.weight]


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, "8bit"])
def test_small_states_stay_small_and_train_alike(state_dtype: Any) -> None:
    torch.manual_seed(0)
    model = exf.wrap(FFNs(32, 64), seed=1, fuse_on="step", bank_init="uniform").double()
    twin = copy.deepcopy(model)
    optimizer = exf.ExpertAdamW(model.parameters(), lr=1e-3, state_dtype=state_dtype)
    train(model, optimizer, range(20))
    restored = exf.ExpertAdamW(model.parameters(), lr=1e-3, state_dtype=state_dtype)
    restored.load_state_dict(optimizer.state_dict())
    train(model, restored, range(20, 40))
    train(twin, exf.ExpertAdamW(twin.parameters(), lr=1e-3), range(40))
    state: Any = state_of(restored, model)["experts.exp_avg_sq"]
    assert state.codes.dtype == torch.uint8 if state_dtype == "8bit" else state.dtype == state_dtype
    start = wrapped_start(32, 64)
    way = sum((a - b).square().sum() for a, b in zip(twin.parameters(), start, strict=True)).sqrt()
    apart = sum(
        (a - b).square().sum() for a, b in zip(twin.parameters(), model.parameters(), strict=True)
    ).sqrt()
    assert apart < 0.1 * way


def wrapped_start(dim: int, hidden: int) -> list[Tensor]:
    torch.manual_seed(0)
    model = exf.wrap(FFNs(dim, hidden), seed=1, fuse_on="step", bank_init="uniform").double()
    return list(model.parameters())


@given(st.floats(-(2.0**99), 2.0**99, width=32), st.integers(0, 2**31))
def test_numbers_are_rounded_to_a_neighbour_and_right_on_average(number: float, seed: int) -> None:
    exact = torch.full((20000,), number)
    rounded = round_stochastically(exact, torch.Generator().manual_seed(seed)).double()
    step = max(abs(number) / 128, 2.0**-133)  # the distance of neighbours in bfloat16, at most
    assert (rounded - exact).abs().max() <= step
    assert abs(rounded.mean() - exact[0].double()) <= 6 * step / 2 / 20000**0.5


def test_numbers_that_are_not_finite_stay_as_they_are() -> None:
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    rounded = round_stochastically(special, torch.Generator())
    torch.testing.assert_close(rounded, special.bfloat16(), equal_nan=True)


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, torch.float32])
def test_stacks_in_bfloat16_lose_small_changes_unless_they_are_rounded_at_random(
    state_dtype: Any,
) -> None:
    torch.manual_seed(0)
    model = exf.wrap(FFNs(64, 64), seed=1, variant="sw", fuse_on="step").bfloat16()
    nn.init.ones_(model.blocks[0].fc1.weight)
    optimizer = exf.ExpertSGD(model.parameters(), lr=0.0, state_dtype=state_dtype)
    train(model, optimizer, range(1))
    state_of(optimizer, model)["experts"].fill_(1)
    nn.init.ones_(model.blocks[0].fc1.weight)
    optimizer.param_groups[0].update(lr=1e-3, weight_decay=0.5)
    for _ in range(50):
        (0 * model(inputs(64).bfloat16()).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = 1.0 if state_dtype is None else (1 - 0.5e-3) ** 50
    experts = state_of(optimizer, model)["experts"]
    assert experts.double().mean().item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("variant", ["sw", "dw", "mb"])
@pytest.mark.parametrize(("make", "lr"), [(exf.ExpertAdamW, 1e-2), (exf.ExpertSGD, 0.5)])
def test_experts_in_bfloat16_train_like_experts_in_float32(
    variant: Any, make: Any, lr: float
) -> None:
    model, twin = wrapped(variant=variant), wrapped(variant=variant)
    start = dict(exf.fused_state_dict(twin))
    for each, dtype in ((model, torch.bfloat16), (twin, None)):
        optimizer = make(exf.param_groups(each, weight_decay=0.1), lr=lr, expert_dtype=dtype)
        train(each, optimizer, range(40))
        assert state_of(optimizer, each)["experts"].dtype == (dtype or torch.float32)
    ours, theirs = exf.fused_state_dict(model), exf.fused_state_dict(twin)
    assert {value.dtype for value in ours.values()} == {torch.float32}
    assert distance(ours, theirs) < 0.1 * distance(start, theirs)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return sum((one[name] - other[name]).square().sum().item() for name in one) ** 0.5


def test_states_are_those_of_the_fused_weight_unless_asked_for() -> None:
    for state_dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = wrapped()
        optimizer = exf.ExpertAdamW(model.parameters(), state_dtype=state_dtype, **SMALL)
        train(model, optimizer)
        assert state_of(optimizer, model)["experts.exp_avg"].dtype == expected


def test_the_fused_weight_is_the_float32_sum_of_the_experts() -> None:
    model = wrapped()
    optimizer = exf.ExpertAdamW(model.parameters(), lr=1e-2, **SMALL)
    train(model, optimizer)
    weights = model.blocks[0].fusion_weights().double()
    expected = torch.tensordot(weights, state_of(optimizer, model)["experts"].double(), dims=1)
    fused = model.blocks[0].fc1.weight
    torch.testing.assert_close(fused.double(), expected, rtol=0, atol=1e-7)


def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit() -> None:
    whole, first = wrapped(), wrapped()
    train(whole, exf.ExpertAdamW(whole.parameters(), lr=1e-2, **SMALL), range(4))
    optimizer = exf.ExpertAdamW(first.parameters(), lr=1e-2, **SMALL)
    train(first, optimizer, range(2))
    second = wrapped(seed=2)
    second.load_state_dict(first.state_dict())
    resumed = exf.ExpertAdamW(second.parameters(), lr=1e-2, **SMALL)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(second, resumed, range(2, 4))
    torch.testing.assert_close(dict(second.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)


def sharded(rank: int, model: nn.Module, shape: Any) -> Any:
    model = exf.fully_shard(copy.deepcopy(model), mesh=mesh_of(*shape))
    optimizer = exf.ExpertAdamW(model.parameters(), lr=1e-2, **SMALL)
    for seed in range(20):
        x = my_part(rank, [inputs(32, batch=12, seed=seed).float()])[0]
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert state_of(optimizer, model)["experts"].dtype == torch.bfloat16
    return whole_state(model)


@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_ranks_hold_experts_in_bfloat16_and_end_alike(shape: tuple[int, ...]) -> None:
    name, model = "blocks.0.fc1.weight", wrapped()
    start = exf.fused_state_dict(model)[name]
    states = on_threads(torch.Size(shape).numel(), sharded, model, shape)
    optimizer = exf.ExpertAdamW(model.parameters(), lr=1e-2)
    for seed in range(20):
        loss_of(model, inputs(32, batch=12, seed=seed).float()).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = exf.fused_state_dict(model)[name]
    for state in states:
        torch.testing.assert_close(state, states[0], rtol=0, atol=0)
        assert (state[name] - expected).norm() < 0.1 * (start - expected).norm()


@pytest.mark.parametrize("make", [exf.ExpertAdamW, exf.ExpertSGD])
def test_other_dtypes_are_refused(make: Any) -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    with pytest.raises(ValueError, match="state_dtype must be None, .* got torch.int8"):
        make(parameters, state_dtype=torch.int8)
    with pytest.raises(ValueError, match="expert_dtype must be None, .* got torch.float16"):
        make(parameters, expert_dtype=torch.float16)


def test_learned_weights_get_the_exact_products_with_experts_in_bfloat16() -> None:
    model = wrapped(variant="dw")
    optimizer = exf.ExpertSGD(model.parameters(), lr=0.1, **SMALL)
    train(model, optimizer, range(2))
    (learned, *_) = [p for name, p in model.named_parameters() if name.endswith(".weights")]
    before = learned.detach().double()
    loss_of(model, inputs(32).float()).backward()
    gradient = torch.zeros(4, dtype=torch.float64)
    for parameter in model.blocks[0].parameters():
        if "experts" in optimizer.state[parameter]:
            stack = optimizer.state[parameter]["experts"].double()
            assert optimizer.state[parameter]["experts"].dtype == torch.bfloat16
            gradient += stack.flatten(1) @ parameter.grad.double().flatten()
    optimizer.step()
    torch.testing.assert_close(learned.double(), before - 0.1 * gradient, rtol=0, atol=2e-7)
