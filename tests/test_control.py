"""`sw` is dense training from the mean of the experts; only what it starts from differs."""

import copy

import pytest
import torch
from torch import nn

import exfusion_param as exf
from exfusion_testing.models import FFNs, inputs, loss_of

N, LR, DECAY, EPS = 4, 0.01, 0.05, 1e-8


def groups_for_control(
    control: nn.Module, ffn: dict[str, float], rest: dict[str, float]
) -> list[dict]:
    is_ffn = {name: name.startswith("blocks.") for name, _ in control.named_parameters()}
    parameters = dict(control.named_parameters())
    return [
        {"params": [parameters[name] for name in parameters if is_ffn[name]], **ffn},
        {"params": [parameters[name] for name in parameters if not is_ffn[name]], **rest},
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "sgd with momentum"])
def test_sw_equals_its_dense_control_over_200_steps(optimizer: str) -> None:
    model = exf.wrap(FFNs().double(), variant="sw", num_experts=N)
    control = exf.fuse(copy.deepcopy(model))
    if optimizer == "adamw":
        ours = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, eps=EPS)
        groups = groups_for_control(control, {"eps": EPS * N}, {"eps": EPS})
        theirs: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY)
    else:
        momentum = 0.9 if "momentum" in optimizer else 0.0
        ours = torch.optim.SGD(model.parameters(), LR, momentum=momentum, weight_decay=DECAY)
        groups = groups_for_control(
            control,
            {"lr": LR / N, "weight_decay": DECAY * N},
            {"lr": LR, "weight_decay": DECAY},
        )
        theirs = torch.optim.SGD(groups, momentum=momentum)
    for step in range(200):
        x = inputs(seed=step)
        for trained, stepper in ((model, ours), (control, theirs)):
            stepper.zero_grad()
            loss_of(trained, x).backward()
            stepper.step()
    fused = exf.fused_state_dict(model)
    for name, value in control.state_dict().items():
        torch.testing.assert_close(fused[name], value, rtol=0, atol=1e-12)


def test_control_starts_from_the_draws_that_the_same_seed_gives_any_variant() -> None:
    dense = FFNs()
    control = exf.fuse(exf.wrap(copy.deepcopy(dense), variant="sw", seed=3))
    bank = exf.wrap(copy.deepcopy(dense), variant="mb", seed=3)
    experts = bank.blocks[1].fc2.parametrizations.weight.original
    torch.testing.assert_close(control.blocks[1].fc2.weight, experts.mean(0))


def test_mean_of_independent_experts_has_a_smaller_deviation() -> None:
    dense = FFNs(dim=100, hidden=200, depth=1)
    deviation = dense.blocks[0].fc1.weight.std().item()
    control = exf.fuse(exf.wrap(dense, variant="sw", num_experts=N))
    assert control.blocks[0].fc1.weight.std().item() == pytest.approx(deviation / N**0.5, rel=0.02)
