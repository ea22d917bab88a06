"""Warnings and errors at an optimizer's first step on expert stacks, `fuse_on="forward"`."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm.optim
import torch
import transformers
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_testing.models import FFNs, inputs, loss_of


class Normed(FFNs):
    """With a norm, whose weight and bias are vectors too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss_of(model, inputs().float()).backward()
    optimizer.step()
    optimizer.zero_grad()


def warnings_of(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            step(model, optimizer)
    return [str(each.message) for each in caught]


def groups_by(model: nn.Module, is_exempt: Callable[[str, Tensor], bool]) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if is_exempt(n, p) == exempt], "weight_decay": decay}
        for exempt, decay in ((False, 0.1), (True, 0.0))
    ]


RULES: list[tuple[Callable[[str, Tensor], bool], dict[str, int]]] = [
    (lambda name, p: p.ndim < 2, {"sw": 4, "dw": 4, "mb": 4}),
    (lambda name, p: name.endswith(".bias"), {"sw": 4, "dw": 6, "mb": 4}),
]


@pytest.mark.parametrize("variant", ["sw", "dw", "mb"])
@pytest.mark.parametrize("rule", [0, 1])
def test_stacked_biases_that_decay_warn_once_where_plain_ones_do_not(
    variant: str, rule: int
) -> None:
    is_exempt, counts = RULES[rule]
    model = exf.wrap(Normed(), variant=variant)
    optimizer = torch.optim.AdamW(groups_by(model, is_exempt))
    (message,) = warnings_of(model, optimizer)
    assert message.startswith(f"{counts[variant]} stacked biases or learned fusion weights decay")


@pytest.mark.parametrize("variant", ["sw", "dw", "mb"])
def test_the_ways_out_and_plain_loops_do_not_warn(variant: str) -> None:
    model = exf.wrap(Normed(), variant=variant)
    names = exf.no_weight_decay_names(model)
    for groups in (
        exf.param_groups(model, 0.1),
        groups_by(model, lambda name, p: name in names),
        model.parameters(),  # everything decays, as in a dense loop without groups
    ):
        assert warnings_of(model, torch.optim.AdamW(groups)) == []
    dense = Normed()
    stepped = torch.optim.AdamW(groups_by(dense, RULES[0][0]))
    assert warnings_of(dense, stepped) == []


def test_under_step_biases_are_the_models_own() -> None:
    model = exf.wrap(Normed(), variant="dw", fuse_on="step")
    optimizer = torch.optim.AdamW(groups_by(model, lambda name, p: p.ndim < 2))
    assert warnings_of(model, optimizer) == []


def test_timms_muon_is_refused_and_trains_under_step() -> None:
    model = exf.wrap(Normed(), variant="sw")
    optimizer = timm.optim.create_optimizer_v2(model, "muon", lr=0.01)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        with pytest.raises(RuntimeError, match='timm\'s Muon would flatten .* fuse_on="step"'):
            step(model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model = exf.wrap(Normed(), variant="sw", fuse_on="step")
    step(model, timm.optim.create_optimizer_v2(model, "muon", lr=0.01))


class Muon(torch.optim.Optimizer):
    """As people copy it into their repositories."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, {"lr": 0.02, "momentum": 0.95, "ns_steps": 5} | defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.ones_like(p), alpha=-group["lr"])


def test_a_copied_muon_warns_once_unless_it_gets_no_stack() -> None:
    model = exf.wrap(Normed(), variant="sw")
    matrices = [p for p in model.parameters() if p.ndim > 2]
    (message,) = warnings_of(model, Muon(matrices))
    assert message.startswith("Muon orthogonalizes matrices and holds 4 expert stacks")
    rest = [p for p in model.parameters() if p.ndim < 3]
    plain = {"params": rest, "use_muon": False}
    model.zero_grad()
    assert warnings_of(model, Muon([plain, {"params": [nn.Parameter(torch.ones(2, 2))]}])) == []


def adafactor(model: nn.Module) -> torch.optim.Optimizer:
    return transformers.Adafactor(model.parameters(), lr=1e-3, relative_step=False)


@pytest.mark.parametrize("hidden", [4, 6])
def test_transformers_adafactor_trains_and_resumes(hidden: int) -> None:
    torch.manual_seed(0)
    model = exf.wrap(FFNs(hidden=hidden), variant="dw", seed=0)
    optimizer = adafactor(model)
    for _ in range(2):
        step(model, optimizer)
    replica = copy.deepcopy(model)
    resumed = adafactor(replica)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        step(model, optimizer)
        step(replica, resumed)
    for name, value in model.state_dict().items():
        assert torch.equal(replica.state_dict()[name], value), name


def test_dense_state_that_is_loaded_before_the_first_step_is_refused() -> None:
    dense = FFNs()
    trained = torch.optim.AdamW(dense.parameters())
    step(dense, trained)
    model = exf.wrap(FFNs(), variant="sw")
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(trained.state_dict())
    with pytest.raises(RuntimeError, match=r"AdamW holds state of shape"):
        step(model, optimizer)


def test_a_compiled_model_does_not_train_past_a_lost_write() -> None:
    model = exf.wrap(FFNs(), variant="sw")
    model.blocks[1].fc2.weight.data.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="in-place write to the weight .* in 'blocks.1'"):
        optimizer.step()
