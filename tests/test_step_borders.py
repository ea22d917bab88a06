"""Optimizer states, GradScaler, compiled and traced models with experts, `fuse_on="step"`."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_param.fusion.lookup import groups_of
from exfusion_testing.models import FFNs, inputs, loss_of

OPTIMIZERS = [
    "Adam",
    "AdamW",
    "NAdam",
    "RAdam",
    "Adamax",
    "RMSprop",
    "Adafactor",
    "Rprop",
    "SGD",
    "ASGD",
    "Adadelta",
    "Adagrad",
]


def wrapped(variant: str = "mb", **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return exf.wrap(FFNs().double(), variant=variant, fuse_on="step", seed=3, **settings)


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    kind = getattr(exf if name.startswith("Expert") else torch.optim, name)
    return kind(model.parameters(), lr=0.01)


def train(model: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        loss_of(model, inputs(seed=step)).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def assert_alike(one: nn.Module, other: nn.Module, atol: float = 1e-12) -> None:
    for ours, theirs in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("variant", ["sw", "dw", "mb"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_with_experts_that_had_no_gradient_loads(variant: str, name: str) -> None:
    model = wrapped(variant)
    frozen = model.blocks[0].fc1.bias.requires_grad_(False)
    optimizer = optimizer_of(name, model)
    train(model, optimizer)
    twin = copy.deepcopy(model)
    resumed = optimizer_of(name, twin)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (model, twin):
        each.blocks[0].fc1.bias.requires_grad_(True)
    train(model, optimizer)
    train(twin, resumed)
    assert_alike(model, twin, atol=1e-10)  # torch casts NAdam's products when it loads them
    assert frozen.grad is None


@pytest.mark.parametrize("variant", ["sw", "dw", "mb"])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "ExpertAdamW"])
@pytest.mark.parametrize("biases_first", [False, True])
def test_parts_of_an_ffn_in_two_optimizers_are_as_in_one(
    variant: str, name: str, biases_first: bool
) -> None:
    model = wrapped(variant)
    twin = copy.deepcopy(model)
    own = [w for weights in groups_of(twin) for w in weights.parameters()]
    matrices = [p for p in twin.parameters() if p.ndim > 1 and not any(p is w for w in own)]
    rest = [p for p in twin.parameters() if not any(p is m for m in matrices)]
    parts = [rest, matrices] if biases_first else [matrices, rest]
    kind = getattr(exf if name.startswith("Expert") else torch.optim, name)
    train(twin, *[kind(part, lr=0.01) for part in parts], steps=5)
    train(model, kind(model.parameters(), lr=0.01), steps=5)
    assert_alike(model, twin)


@pytest.mark.parametrize(("name", "settings"), [("AdamW", {}), ("SGD", {"momentum": 0.9})])
def test_states_of_dense_training_warn(name: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = FFNs().double()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01, **settings)
    train(model, optimizer)
    exf.wrap(model, variant="sw", fuse_on="step", expert_init="upcycle")
    with pytest.warns(UserWarning, match=r"has trained .* as a dense weight"):
        train(model, optimizer)


def test_a_scaled_step_of_expert_sgd_that_overflows_at_first_leaves_no_garbage() -> None:
    model = wrapped("sw")
    twin = copy.deepcopy(model)
    for each, kind in ((model, exf.ExpertSGD), (twin, torch.optim.SGD)):
        optimizer = kind(each.parameters(), lr=0.01, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(3):
            scaler.scale(loss_of(each, inputs(seed=step))).backward()
            if step == 0:
                each.blocks[0].fc1.weight.grad.fill_(float("inf"))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert_alike(model, twin)


def test_making_states_to_load_into_warns_of_no_start() -> None:
    model = wrapped("sw")
    optimizer = optimizer_of("AdamW", model)
    train(model, optimizer)
    twin = wrapped("sw")
    fresh = optimizer_of("AdamW", twin)
    twin.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for group in fresh.param_groups:  # as torch's distributed checkpoints do
            group["lr"] = 0.0
        for parameter in twin.parameters():
            parameter.grad = torch.zeros_like(parameter)
        fresh.step()
        fresh.zero_grad()
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(model, optimizer)
        train(twin, fresh)
    assert_alike(model, twin)


@pytest.mark.parametrize("variant", ["dw", "mb"])
def test_a_model_in_training_is_traced(variant: str) -> None:
    model = wrapped(variant)
    x: Tensor = inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_blocks_with_a_router_use_no_graph_of_those_without() -> None:
    model = wrapped(layers=(-1,), bank_init="uniform")
    twin = copy.deepcopy(model)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for each in (model, twin):
        train(each, torch.optim.AdamW(each.parameters(), lr=0.01))
    assert_alike(model, twin)


def test_fuse_leaves_no_forward_of_its_own() -> None:
    model = exf.fuse(wrapped(bank_init="uniform"))
    assert not any("forward" in vars(module) for module in model.modules())
