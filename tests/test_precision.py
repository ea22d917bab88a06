"""Low precision: the sum in float32, cast once; the fusion weights stay in float32."""

import copy
from collections.abc import Callable

import pytest
import torch
from models import FFNs, inputs, loss_of
from torch import nn

import exfusion_param as exf

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
