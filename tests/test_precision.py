"""Low precision: the sum in float32, cast once; the fusion weights stay in float32."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.strategies import configs, seeds

VARIANTS = ["sw", "dw", "mb"]
CASTS: list[tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = [
    (lambda model: model.to(torch.bfloat16), torch.bfloat16),
    (lambda model: model.half(), torch.float16),
    (lambda model: model.double(), torch.float64),
    (lambda model: model.float(), torch.float32),
]


def fusion_weights(model: nn.Module) -> nn.Module:
    return model.blocks[0].fc1.parametrizations.weight[0].fusion_weights


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("cast", "dtype"), CASTS)
@pytest.mark.parametrize("wrap_first", [True, False])
def test_casting_a_model_keeps_its_fusion_weights_in_float32_at_least(
    variant: str, cast: Callable[[nn.Module], nn.Module], dtype: torch.dtype, wrap_first: bool
) -> None:
    model = FFNs()
    for change in (lambda m: exf.wrap(m, variant=variant), cast)[:: 1 if wrap_first else -1]:
        model = change(model)
    stacks = [p for name, p in model.named_parameters() if name.endswith("original")]
    assert {stack.dtype for stack in stacks} == {dtype}
    own = [*fusion_weights(model).parameters(), *fusion_weights(model).buffers()]
    wide = torch.promote_types(dtype, torch.float32)
    assert all(tensor.dtype == wide for tensor in own)
    optimizer = torch.optim.SGD(exf.param_groups(model, 0.0), lr=0.1)
    loss_of(model, inputs().to(dtype)).backward()
    optimizer.step()
    assert {p.dtype for p in exf.fuse(model).parameters()} == {dtype}


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_casts_the_fused_weight_once(variant: str) -> None:
    """The wrapped model under autocast is bitwise its fused model under autocast."""
    model = exf.wrap(FFNs(), variant=variant, bank_init="uniform").eval()
    dense, x = exf.fuse(copy.deepcopy(model)), inputs().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.blocks[0].fc1.weight.dtype == torch.float32
        assert torch.equal(model(x), dense(x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_under_autocast_stay_within_bfloat16_of_those_without(variant: str) -> None:
    model = exf.wrap(FFNs(dim=16, hidden=32), variant=variant, bank_init="uniform")
    x, gradients = inputs(16).float(), []
    for enabled in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = loss_of(model, x)
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    low, full = gradients
    for name, gradient in full.items():
        assert low[name].dtype == torch.float32
        error = (low[name] - gradient).norm() / gradient.norm()
        assert error < 8 * torch.finfo(torch.bfloat16).eps, name


@given(
    config=configs(bank_init="uniform"),
    dim=st.integers(8, 32),
    hidden=st.integers(17, 64),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=seeds,
)
def test_errors_under_autocast_are_those_of_the_dense_model(
    config: exf.ExFusionConfig, dim: int, hidden: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    wrapped = exf.wrap(FFNs(dim, hidden), config)
    x = inputs(dim, batch=8, tokens=8, seed=seed % 1000)
    ours = relative_errors(wrapped, x, dtype)
    torch.optim.SGD(wrapped.parameters(), lr=0.0).step()  # the bank moves to where the forward was
    theirs = relative_errors(exf.fuse(wrapped), x, dtype)
    for name, error in theirs.items():
        assert ours[name] <= 1.5 * error, name


def relative_errors(model: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """How far outputs and gradients under autocast are from those in float64, in the 2-norm."""
    exact = results(copy.deepcopy(model).double(), x, dtype, autocast=False)
    low = results(model, x.float(), dtype, autocast=True)
    return {name: ((low[name] - exact[name]).norm() / exact[name].norm()).item() for name in low}


def is_linears(name: str) -> bool:
    """Whether it is a parameter that the dense model has too."""
    return "fusion_weights" not in name


def results(model: nn.Module, x: Tensor, dtype: torch.dtype, autocast: bool) -> dict[str, Tensor]:
    """The output, and the gradients for the input and for the linears of each part."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        y = model(x)
    y.double().square().mean().backward()
    gradients = {
        name: torch.cat([p.grad.flatten() for n, p in part.named_parameters() if is_linears(n)])
        for name, part in model.named_children()
    }
    return {"output": y, "input": x.grad} | gradients
