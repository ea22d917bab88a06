"""Stacks and optimizer states that are stored in bfloat16 or 8 bits."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_param.checkpoint import fuse_checkpoint, save_config
from exfusion_param.state_storage import round_stochastically
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


def small(dim: int = 32, hidden: int = 64, **fields: Any) -> Any:
    """A float32 model whose stacks are stored in bfloat16."""
    torch.manual_seed(0)
    fields = {"seed": 1, "bank_init": "uniform", "expert_dtype": "bfloat16"} | fields
    return exf.wrap(FFNs(dim, hidden), fuse_on="step", **fields)


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
    stack = model.blocks[0].fc1.parametrizations.weight.original
    state = restored.state[stack]["exp_avg_sq"]
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
    stack = model.blocks[0].fc1.parametrizations.weight.original
    nn.init.ones_(stack)
    optimizer = exf.ExpertSGD(model.parameters(), lr=1e-3, state_dtype=state_dtype)
    for _ in range(50):
        (0 * model(inputs(64).bfloat16()).sum()).backward()
        optimizer.param_groups[0]["weight_decay"] = 0.5
        optimizer.step()
        optimizer.zero_grad()
    expected = 1.0 if state_dtype is None else (1 - 0.5e-3) ** 50
    assert stack.double().mean().item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("variant", ["sw", "dw", "mb"])
@pytest.mark.parametrize(("make", "lr"), [(exf.ExpertAdamW, 1e-2), (exf.ExpertSGD, 0.5)])
def test_stacks_in_bfloat16_train_like_stacks_in_float32(
    variant: Any, make: Any, lr: float
) -> None:
    model, twin = small(variant=variant), small(variant=variant, expert_dtype="model")
    start = copy.deepcopy(exf.fused_state_dict(twin))
    for each in (model, twin):
        train(each, make(exf.param_groups(each, weight_decay=0.1), lr=lr), range(40))
    for holder in model.blocks[0].fc1.parametrizations.values():
        assert holder.original.dtype == torch.bfloat16
        assert holder[0].fused.dtype == torch.float32
    ours, theirs = exf.fused_state_dict(model), exf.fused_state_dict(twin)
    assert {name: value.dtype for name, value in ours.items()} == dict.fromkeys(
        theirs, torch.float32
    )
    assert distance(ours, theirs) < 0.1 * distance(start, theirs)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return sum((one[name] - other[name]).square().sum().item() for name in one) ** 0.5


def test_states_are_those_of_the_fused_weight_unless_asked_for() -> None:
    model = small()
    stack = model.blocks[0].fc1.parametrizations.weight.original
    for state_dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        optimizer = exf.ExpertAdamW(model.parameters(), lr=1e-3, state_dtype=state_dtype)
        train(model, optimizer)
        assert optimizer.state[stack]["exp_avg"].dtype == expected


def test_fuse_leaves_the_float32_weights_of_the_sum() -> None:
    model = small()
    train(model, exf.ExpertAdamW(model.parameters(), lr=1e-2))
    dense, kinds = exf.fused_state_dict(model), type(FFNs(32, 64).blocks[0].fc1)
    linear = model.blocks[0].fc1
    stack = linear.parametrizations.weight.original.double()
    weights = linear.parametrizations.weight[0].fusion_weights().double()
    expected = torch.tensordot(weights, stack, dims=1)
    x = inputs(32).float()
    before = model(x)
    exf.fuse(model)
    assert type(linear) is kinds
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(linear.weight.double(), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(dict(model.state_dict()), dict(dense), rtol=0, atol=0)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_a_checkpoint_on_disk_fuses_to_float32(tmp_path: Path) -> None:
    model = small()
    train(model, exf.ExpertAdamW(model.parameters(), lr=1e-2))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    save_config(model, tmp_path)
    dense = load_file(fuse_checkpoint(tmp_path, tmp_path / "dense.safetensors"))
    torch.testing.assert_close(dense, dict(exf.fused_state_dict(model)), rtol=0, atol=1e-6)


def test_dense_weights_come_in_rounded() -> None:
    model, dense = small(upcycle_noise=0.0), FFNs(32, 64)
    exf.load_dense_state_dict(model, dense.state_dict())
    expected = dense.blocks[0].fc1.weight.bfloat16().float()
    torch.testing.assert_close(model.blocks[0].fc1.weight, expected, rtol=0, atol=0)
    with torch.no_grad():
        model.blocks[0].fc1.weight = 2 * dense.blocks[0].fc1.weight
    torch.testing.assert_close(model.blocks[0].fc1.weight, 2 * expected, rtol=0, atol=0)


def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit() -> None:
    whole, first = small(), small()
    train(whole, exf.ExpertAdamW(whole.parameters(), lr=1e-2), range(4))
    optimizer = exf.ExpertAdamW(first.parameters(), lr=1e-2)
    train(first, optimizer, range(2))
    second = small(seed=2)
    second.load_state_dict(first.state_dict())
    resumed = exf.ExpertAdamW(second.parameters(), lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(second, resumed, range(2, 4))
    torch.testing.assert_close(dict(second.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)


def sharded(rank: int, wrapped: nn.Module, shape: Any) -> Any:
    model = exf.fully_shard(copy.deepcopy(wrapped), mesh=mesh_of(*shape))
    optimizer = exf.ExpertAdamW(model.parameters(), lr=1e-2)
    for seed in range(20):
        x = my_part(rank, [inputs(32, batch=12, seed=seed).float()])[0]
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole_state(model), exf.fused_state_dict(model)["blocks.0.fc1.weight"].full_tensor()


@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_ranks_hold_stacks_in_bfloat16_and_end_alike(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    start = exf.fused_state_dict(small())["blocks.0.fc1.weight"]
    model = small(expert_dtype="model")
    optimizer = exf.ExpertAdamW(model.parameters(), lr=1e-2)
    train_on = [inputs(32, batch=12, seed=seed).float() for seed in range(20)]
    for x in train_on:
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = exf.fused_state_dict(model)["blocks.0.fc1.weight"]
    states = on_threads(torch.Size(shape).numel(), sharded, small(), shape)
    for state, fused in states:
        assert state["blocks.0.fc1.parametrizations.weight.original"].dtype == torch.bfloat16
        torch.testing.assert_close(state, states[0][0], rtol=0, atol=0)
        assert (fused - expected).norm() < 0.1 * (start - expected).norm()


def test_optimizers_that_round_to_the_nearest_are_refused() -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(RuntimeError, match="AdamW would round .* Use ExpertAdamW or ExpertSGD"):
        train(model, optimizer)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    rest = [p for name, p in model.named_parameters() if not name.endswith("original")]
    train(model, torch.optim.AdamW(rest, lr=1e-3))  # it moves no stack


def test_models_of_another_dtype_and_other_settings_are_refused() -> None:
    model = FFNs(4, 4).bfloat16()
    with pytest.raises(ValueError, match="not of float32"):
        exf.wrap(model, fuse_on="step", expert_dtype="bfloat16")
    for fields in ({}, {"fuse_on": "step", "displacement": "shared"}):
        with pytest.raises(ValueError, match='needs fuse_on="step" and displacement="own"'):
            exf.ExFusionConfig(expert_dtype="bfloat16", **fields)


@pytest.mark.parametrize("make", [exf.ExpertAdamW, exf.ExpertSGD])
def test_other_dtypes_of_states_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="state_dtype must be None, .* got torch.int8"):
        make([nn.Parameter(torch.zeros(2))], state_dtype=torch.int8)
