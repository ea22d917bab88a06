"""The memory bank in unusual loops: counted correctly, or refused with an error."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import exfusion_param as exf
from exfusion_param.tensors import functional
from exfusion_testing.banks import (
    MOMENTUM,
    X,
    adamw,
    assert_bank,
    backward,
    bank_of,
    make,
    moved,
)
from exfusion_testing.models import FFNs, loss_of
from exfusion_testing.processes import run
from exfusion_testing.ranks import on_threads

MODES: list[Any] = ["forward", "step"]


def of_both(fuse_on: Any) -> tuple[nn.Module, Any]:
    """A model and its memory bank's module."""
    model = make(fuse_on=fuse_on)
    return model, bank_of(model)


@pytest.mark.parametrize("checkpointed", [0, 1, 2])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("fuse_on", MODES)
def test_every_use_of_an_ffn_counts_where_one_runs_in_a_backward_within_the_backward(
    fuse_on: Any, frozen: bool, checkpointed: int
) -> None:
    model, bank = of_both(fuse_on)
    bank.router.requires_grad_(not frozen)
    block = model.blocks[0]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        x, routed = model.stem(X[0]), []
        for use in range(3):
            with torch.no_grad():
                routed.append(functional.route(x, bank.router))
            x = x + (checkpoint(block, x, use_reentrant=True) if use == checkpointed else block(x))
        expected = MOMENTUM * bank.bank + (1 - MOMENTUM) * torch.stack(routed).mean(0)
        x.square().mean().backward()
        optimizer.step()
        assert_bank(model, expected)
        optimizer.zero_grad()


@pytest.mark.parametrize("is_dropped", [False, True])
@pytest.mark.parametrize("thaws", [True, False])
def test_votes_stay_when_the_router_thaws_or_freezes_in_mid_accumulation(
    thaws: bool, is_dropped: bool
) -> None:
    model = make()
    router = bank_of(model).router
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        router.requires_grad_(not thaws)
        expected = moved(model, *X[int(is_dropped) :])
        backward(model, X[0])
        if is_dropped:
            optimizer.zero_grad()
        router.requires_grad_(thaws)
        backward(model, *X[1:])
        optimizer.step()
        assert_bank(model, expected)
        optimizer.zero_grad()


def pcgrad(model: nn.Module, tasks: Sequence[Tensor]) -> None:
    """Put a mean of projected gradients into `.grad`, as PCGrad does, without `backward`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    of_tasks = [torch.autograd.grad(loss_of(model, x), parameters) for x in tasks]
    for parameter, *gradients in zip(parameters, *of_tasks, strict=True):
        first, second = (gradient.flatten() for gradient in gradients)
        along = (first @ second).clamp(max=0) / second.square().sum().clamp(min=1e-12)
        parameter.grad = ((first - along * second + second) / 2).view_as(parameter).clone()


@pytest.mark.parametrize("fuse_on", MODES)
def test_gradients_of_several_tasks_that_are_composed_by_hand_count(fuse_on: Any) -> None:
    model = make(fuse_on=fuse_on)
    optimizer = adamw(model)
    backward(model, X[3])  # an ordinary step first
    optimizer.step()
    for _ in range(3):
        expected = moved(model, *X[:2])
        pcgrad(model, X[:2])
        optimizer.step()
        assert_bank(model, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fuse_on", MODES)
def test_gradients_composed_by_hand_count_while_all_weights_and_gradients_are_zero(
    fuse_on: Any, bias: bool
) -> None:
    model = exf.wrap(FFNs(depth=1, bias=bias).double(), momentum=MOMENTUM, seed=0, fuse_on=fuse_on)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        expected = moved(model, X[step])
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(loss_of(model, X[step]), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        assert_bank(model, expected)


def stash(model: nn.Module) -> list[Tensor]:
    stashed = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [gradient.clone() for gradient in stashed]


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("fuse_on", MODES)
def test_gradients_that_are_stashed_and_summed_by_hand_count(fuse_on: Any, to_none: bool) -> None:
    model = make(fuse_on=fuse_on)
    optimizer = adamw(model)
    for _ in range(2):
        expected = moved(model, *X)
        stashed = []
        for x in X:
            optimizer.zero_grad(set_to_none=to_none)
            backward(model, x)
            stashed.append(stash(model))
        for parameter, *gradients in zip(model.parameters(), *stashed, strict=True):
            parameter.grad = torch.stack(gradients).sum(0)
        optimizer.step()
        assert_bank(model, expected)
        optimizer.zero_grad(set_to_none=to_none)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("fuse_on", MODES)
def test_gradients_that_are_summed_in_place_count(fuse_on: Any, to_none: bool) -> None:
    model = make(fuse_on=fuse_on)
    optimizer = adamw(model)
    for _ in range(2):
        expected = moved(model, *X)
        stashed = []
        for x in X:
            optimizer.zero_grad(set_to_none=to_none)
            backward(model, x)
            stashed.append(stash(model))
        for parameter, *gradients in zip(model.parameters(), *stashed, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(torch.stack(gradients).sum(0))
        optimizer.step()
        assert_bank(model, expected)
        optimizer.zero_grad(set_to_none=to_none)


@pytest.mark.parametrize("fuse_on", MODES)
def test_clipping_in_place_brings_no_dropped_micro_batch_back(fuse_on: Any) -> None:
    model = make(fuse_on=fuse_on)
    optimizer = adamw(model)
    for _ in range(2):
        expected = moved(model, X[1])
        backward(model, X[0])
        optimizer.zero_grad()
        backward(model, X[1])
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        assert_bank(model, expected)
        optimizer.zero_grad()


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("fuse_on", MODES)
def test_a_gradient_that_is_thrown_away_right_before_the_step_does_not_count(
    fuse_on: Any, to_none: bool
) -> None:
    model = make(fuse_on=fuse_on)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        expected = bank_of(model).bank.clone()
        backward(model, *X[:2])
        optimizer.zero_grad(set_to_none=to_none)
        optimizer.step()
        assert_bank(model, expected)


@pytest.mark.parametrize("fuse_on", MODES)
def test_a_step_on_zeros_that_makes_an_optimizers_states_does_not_count(fuse_on: Any) -> None:
    model = make(fuse_on=fuse_on)
    expected = bank_of(model).bank.clone()
    torch.autograd.grad(loss_of(model, X[0]), list(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9).step()
    assert_bank(model, expected)


@pytest.mark.parametrize("fuse_on", MODES)
def test_a_pass_for_other_gradients_between_two_optimizers_of_one_backward_does_not_count(
    fuse_on: Any,
) -> None:
    model = make(fuse_on=fuse_on)
    router = bank_of(model).router
    rest = [parameter for parameter in model.parameters() if parameter is not router]
    optimizers = torch.optim.SGD([router], lr=0.1), torch.optim.SGD(rest, lr=0.1)
    expected = moved(model, X[0])
    backward(model, X[0])
    optimizers[0].step()
    torch.autograd.grad(loss_of(model, X[1]), list(model.parameters()))
    optimizers[1].step()
    assert_bank(model, expected)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("is_first", [True, False])
def test_an_optimizer_of_each_parameter_that_steps_in_the_backward_does_not_warn(
    is_first: bool, to_none: bool
) -> None:
    model = make()
    if is_first:  # so that its hook precedes the bank's own
        bank_of(model).votes.follow(None)

    def use(x: Tensor) -> Tensor:
        x = model.stem(x)
        for _ in range(2):  # the first stack is stepped before the router's last vote
            x = x + model.blocks[0](x)
        return model.head(x).square().mean()

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad(set_to_none=to_none)

    optimizers = {p: torch.optim.AdamW([p], lr=0.01) for p in model.parameters()}
    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(12):
        bank, router, x = bank_of(model), bank_of(model).router, model.stem(X[0])
        with torch.no_grad():
            first = functional.route(x, router)
            second = functional.route(x + model.blocks[0](x), router)
        expected = MOMENTUM * bank.bank + (1 - MOMENTUM) * (first + second) / 2
        use(X[0]).backward()
        assert_bank(model, expected)


AGAIN = """
import sys
import torch
from exfusion_testing.banks import X, adamw, assert_bank, backward, bank_of, make, moved

model = make()
for name in [name for name in sys.modules if name.split(".")[0] == "exfusion_param"]:
    del sys.modules[name]
import exfusion_param as again
from torch import nn

other = again.wrap(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), seed=0)
optimizer = adamw(model)
for _ in range(2):
    expected = moved(model, *X)
    other(X[0].float()).sum().backward()
    backward(model, *X)
    optimizer.step()
    assert_bank(model, expected)
    optimizer.zero_grad()
"""


@pytest.mark.processes
def test_a_model_trains_on_when_the_package_is_imported_a_second_time(tmp_path: Path) -> None:
    script = tmp_path / "again.py"
    script.write_text(AGAIN)
    run(script)


@pytest.mark.parametrize("fuse_on", MODES)
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.compiled)])
def test_an_empty_batch_has_no_vote_beside_another(fuse_on: Any, is_compiled: bool) -> None:
    model = make(fuse_on=fuse_on)
    optimizer = adamw(model)
    run = torch.compile(model, backend="eager") if is_compiled else model
    for _ in range(2):
        expected = moved(model, *X[:2])
        (run(X[0][:0]).sum() + loss_of(run, X[0]) + loss_of(run, X[1])).backward()
        optimizer.step()
        assert_bank(model, expected)
        optimizer.zero_grad()


def adjoint(rank: int, gradients: Tensor) -> list[float]:
    """What a loss `<g_r, average(w)>` of each rank r sends to `w` here; rank 1 has no vote."""
    model = make()  # which its votes hold weakly
    votes, vote = bank_of(model).votes, float(rank != 1)
    marked = votes.average(torch.ones(4, dtype=torch.float64), vote)
    sent: Tensor = votes.average_gradient(torch.cat([gradients[rank], torch.ones(1)]), marked, vote)
    return sent.tolist()


def test_a_rank_without_tokens_sends_no_gradient_to_its_router() -> None:
    gradients = torch.randn(3, 4, dtype=torch.float64)
    expected = (gradients.sum(0) / 2).tolist()
    sent = on_threads(3, adjoint, gradients)
    assert sent[0] == sent[2] == pytest.approx(expected)
    assert sent[1] == [0.0] * 4


@pytest.mark.parametrize("swaps", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("fuse_on", MODES)
def test_a_model_that_is_moved_between_a_dropped_backward_and_the_next_counts(
    fuse_on: Any, frozen: bool, swaps: bool
) -> None:
    model, bank = of_both(fuse_on)
    bank.router.requires_grad_(not frozen)
    backward(model, X[0])
    model.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(swaps)
    try:
        model.float().double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = moved(model, *X[:2])
    backward(model, *X[:2])
    optimizer.step()
    assert_bank(model, expected)
