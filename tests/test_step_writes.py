"""Under `fuse_on="step"`: what is written to a weight from outside stays."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.optim import Lookahead
from torch import nn

import exfusion_param as exf
from exfusion_param.fusion.lookup import groups_of
from exfusion_testing.models import FFNs, inputs
from exfusion_testing.step_models import (
    EXACT,
    VARIANTS,
    Experts,
    adamw,
    assert_equals_oracle,
    assert_same,
    batch,
    dense_state,
    dense_twin,
    fusion_weights,
    loss_of,
    train,
    trained,
    wrapped,
)
from exfusion_testing.twins import plain, twins

X = batch(9)


def named_dense(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if "fusion_weights" not in n}


@pytest.mark.parametrize("calls_eval", ["before", "between", "never"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_averages_that_are_swapped_in_are_used_and_swapped_out(
    variant: str, calls_eval: str
) -> None:
    model = trained(variant)
    optimizer = adamw(model)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    for seed in range(3):
        train(model, optimizer, [seed])
        for name, p in model.named_parameters():
            average[name].lerp_(p.detach(), 0.5)
    if calls_eval == "before":
        model.eval()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    twin_optimizer = adamw(twin)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    now = model(X)
    for name, p in model.named_parameters():
        p.data.copy_(average[name])
    if calls_eval == "between":
        model.eval()
    dense = dense_twin(model)
    assert_same(model(X), dense(X), 1e-14)
    assert (model(X) - now).abs().max() > 1e-4
    shipped = exf.fused_state_dict(model)
    assert_same(dict(shipped), dict(dense.state_dict()), 1e-14)
    for name, p in model.named_parameters():
        p.data.copy_(weights[name])
    assert torch.equal(model(X), now)
    for each, stepper in ((model.train(), optimizer), (twin.train(), twin_optimizer)):
        train(each, stepper, range(3, 6))
    assert_same(dense_state(model), dense_state(twin))


WRITES: dict[str, Callable[[nn.Parameter], Any]] = {
    "data.mul_": lambda p: p.data.mul_(2),
    "data.copy_": lambda p: p.data.copy_(torch.ones_like(p)),
    "data.clamp_": lambda p: p.data.clamp_(-0.1, 0.1),
    "assigned data": lambda p: setattr(p, "data", 2 * p.data),
    "detach": lambda p: p.detach().mul_(2),
    "set_": lambda p: p.data.set_(3 * p.data),
    "numpy": lambda p: p.detach().numpy().__imul__(2),
    "zero_": lambda p: p.data.zero_(),
    "fill_ of a row": lambda p: p.data[:1].fill_(3),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_in_the_next_forward_and_the_next_step_moves_from_it(
    variant: str, write: str
) -> None:
    model = wrapped(variant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer)
    for block in model.blocks:
        WRITES[write](block.fc1.weight)
    dense = dense_twin(model)
    assert torch.equal(model(X), dense(X))
    assert_same(dict(exf.fused_state_dict(model)), dict(dense.state_dict()), 0)
    written = model.blocks[0].fc1.weight.detach().clone()
    loss_of(model, X).backward()
    gradient = model.blocks[0].fc1.weight.grad.clone()
    vector = fusion_weights(model)[0].current_weights().clone()
    optimizer.step()
    if variant == "sw":  # SGD on each of N experts by w_i G: lr / N
        moved = written - 0.1 * vector.square().sum() * gradient
        assert_same(model.blocks[0].fc1.weight.detach(), moved)
    elif variant == "dw":
        assert (model.blocks[0].fc1.weight.detach() - written).abs().max() < 0.3
    fused = exf.fuse(copy.deepcopy(model))
    assert torch.equal(fused(X), model.eval()(X))


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_dtype_and_back_rounds_as_on_the_dense_model(variant: str) -> None:
    model = wrapped(variant)
    optimizer = train(model)
    dense = dense_twin(model)
    for each in (model, dense):
        each.bfloat16().double()
    assert_same(dense_state(model), dense_state(dense), 0)
    train(model, optimizer)
    assert all(value.dtype == torch.float64 for value in model.state_dict().values())


@pytest.mark.parametrize("variant", EXACT)
def test_clamping_after_each_step_is_added_to_every_expert(variant: str) -> None:
    model = wrapped(variant)
    optimizer = adamw(model)
    for seed in range(5):
        train(model, optimizer, [seed])
        with torch.no_grad():
            for p in named_dense(model).values():
                p.clamp_(-0.2, 0.2)
        assert max(p.abs().max() for p in named_dense(model).values()) <= 0.2
        for weights in fusion_weights(model):
            for fused in weights.fused:
                before = fused.experts().clone()
                spread = before - before.mean(0)
                assert_same(fused.experts() - fused.experts().mean(0), spread, 1e-14)


@pytest.mark.parametrize("variant", EXACT)
def test_timms_lookahead_is_that_of_the_experts(variant: str) -> None:
    model = wrapped(variant)
    oracle = Experts(model)
    ours = Lookahead(torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.5, k=2)
    theirs = Lookahead(torch.optim.SGD(oracle.parameters(), lr=0.1), alpha=0.5, k=2)
    for seed in range(8):
        for each, optimizer in ((model, ours), (oracle, theirs)):
            each.zero_grad()
            loss_of(each, batch(seed)).backward()
            optimizer.step()
    if variant == "sw":  # linear in the experts
        assert_equals_oracle(model, oracle)
    else:  # the slow weights are the fused ones, as on the dense model
        assert_same(dense_state(model)["head.weight"], oracle.plain()["head.weight"].detach(), 0.1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_lookahead_by_data_leaves_what_it_writes(variant: str) -> None:
    model = wrapped(variant)
    optimizer = adamw(model)
    slow = {name: p.detach().clone() for name, p in named_dense(model).items()}
    for seed in range(6):
        train(model, optimizer, [seed])
        if seed % 2:
            for name, p in named_dense(model).items():
                slow[name].add_(p.data - slow[name], alpha=0.5)
                p.data.copy_(slow[name])
            assert_same(dense_state(model), {n: slow[n] for n in dense_state(model)}, 0)
    shipped = exf.fused_state_dict(model)
    assert_same(dict(shipped), {name: slow[name] for name in shipped}, 0)


CHANGES: dict[str, Callable[[FFNs], Any]] = {
    "copy_": lambda model: model.blocks[0].fc1.weight.copy_(torch.ones(6, 4)),
    "data": lambda model: model.blocks[0].fc1.weight.data.mul_(2),
    "another parameter": lambda model: setattr(
        model.blocks[0].fc1, "weight", nn.Parameter(torch.ones(6, 4).double())
    ),
    "load_state_dict": lambda model: model.load_state_dict(
        {name: value + 1 for name, value in model.state_dict().items()}
    ),
    "assign": lambda model: model.load_state_dict(
        {name: value + 1 for name, value in model.state_dict().items()}, assign=True
    ),
    "reset_parameters": lambda model: model.blocks[0].fc1.reset_parameters(),
    "float and back": lambda model: model.float().double(),
    "vector": lambda model: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(model.parameters()) + 1, model.parameters()
    ),
}


@pytest.mark.filterwarnings("ignore:The weights of .* were loaded without their experts")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("steps", [0, 2])
def test_what_is_written_to_a_weight_stays(variant: str, change: str, steps: int) -> None:
    _, model = twins(variant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for seed in range(steps):
        plain(model, optimizer, inputs(seed=seed))
    with torch.no_grad():
        CHANGES[change](model)
    if change in ("another parameter", "assign"):  # as on a dense model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    written = copy.deepcopy(model)
    if variant == "mb":  # whose bank moves, and the weights with it
        for weights in groups_of(model):
            weights.router.data.zero_()
            weights.bank.fill_(1 / 4)
        written = copy.deepcopy(model)
    x = inputs(seed=9)
    torch.testing.assert_close(model(x), exf.fuse(copy.deepcopy(written))(x), rtol=0, atol=0)
    plain(model, optimizer, inputs(seed=5))
    torch.testing.assert_close(model(x), written(x), rtol=1e-12, atol=1e-12)
