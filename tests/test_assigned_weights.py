"""`linear.weight = t` under `fuse_on="forward"` reads back as t; what borrows it is refused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import exfusion_param as exf
from exfusion_testing.models import FFNs, inputs, loss_of

VARIANTS = ["sw", "dw", "mb"]


def wrapped(variant: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return exf.wrap(FFNs().double(), variant=variant, seed=0, **settings)


def trained(variant: str, steps: int) -> Any:
    model = wrapped(variant)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(steps):
        loss_of(model, inputs(seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_assigned_weight_reads_back_while_the_bank_fills(
    variant: str, steps: int, noise: float
) -> None:
    model = trained(variant, steps)
    for block in model.blocks:
        fusion = block.fc1.parametrizations.weight[0].fusion_weights
        object.__setattr__(fusion.config, "upcycle_noise", noise)
        mass = fusion().sum()
        assert variant != "mb" or torch.isclose(mass, 1 - torch.tensor(0.95).double() ** steps)
        weight, bias = torch.randn(6, 4).double(), torch.randn(6).double()
        block.fc1.weight, block.fc1.bias = weight, nn.Parameter(bias)
        torch.testing.assert_close(block.fc1.weight, weight)
        torch.testing.assert_close(block.fc1.bias, bias)
        mean = block.fc1.parametrizations.weight.original.mean(dim=0)
        assert noise or torch.allclose(mean, weight / mass)
    dense = exf.fused_state_dict(model)
    assert torch.allclose(dense["blocks.1.fc1.weight"], weight)


@pytest.mark.parametrize("variant", VARIANTS)
def test_assigning_a_weight_to_itself_leaves_the_forward_as_it_is(variant: str) -> None:
    model = trained(variant, 3)
    x = inputs()
    evaluated, expected = copy.deepcopy(model).eval()(x), model.eval()(x)
    for block in model.blocks:
        block.fc1.weight = block.fc1.weight.clone()
        block.fc2.weight = block.fc2.weight.detach()
    assert torch.equal(evaluated, expected)
    torch.testing.assert_close(model(x), expected)


def test_a_weight_that_a_zero_bank_fuses_to_zero_warns_once() -> None:
    model = wrapped("mb")
    weight = torch.randn(6, 4).double()
    with pytest.warns(UserWarning, match=r"'blocks.0' first\) is still zero, .* bank_init="):
        model.blocks[0].fc1.weight = weight
    model.blocks[1].fc1.weight = weight
    stack = model.blocks[0].fc1.parametrizations.weight.original
    torch.testing.assert_close(stack.mean(dim=0), weight)
    model = wrapped("mb", bank_init="uniform")
    model.blocks[0].fc1.weight = weight
    torch.testing.assert_close(model.blocks[0].fc1.weight, weight)


@pytest.mark.parametrize("as_parameters", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_functional_call_with_dense_names_is_refused_and_changes_nothing(
    variant: str, as_parameters: bool
) -> None:
    model = wrapped(variant, bank_init="uniform").eval()
    x = inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense: dict[str, Tensor] = {n: 2 * v for n, v in exf.fused_state_dict(model).items()}
    if as_parameters:
        dense = {name: nn.Parameter(value) for name, value in dense.items()}
    with pytest.raises(RuntimeError) as raised:
        functional_call(model, dense, (x,))
    cause = raised.value.__cause__ or raised.value
    assert "functional_call with the dense name of a fused weight" in str(cause)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    expected = functional_call(exf.fuse(copy.deepcopy(model)), dense, (x,))
    doubled = {n: 2 * p if "fusion_weights" not in n else p for n, p in model.named_parameters()}
    torch.testing.assert_close(functional_call(model, doubled, (x,)), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
