"""summarize and metrics."""

import math
from typing import Any

import pytest
import timm
import torch
from torch import nn

import exfusion_param as exf
from exfusion_param.plotting.columns import columns_of, group_names
from exfusion_param.routing import record_routing, router_load
from exfusion_testing.models import FFNs, inputs, loss_of


def test_a_dry_run_says_what_wrap_does_and_changes_nothing() -> None:
    model = FFNs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for fields in ({"variant": "sw"}, {"variant": "dw", "layers": (1,)}, {"shared_router": False}):
        dry = exf.summarize(model, **fields)
        assert dry == exf.summarize(exf.wrap(FFNs(), **fields))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_numbers_of_a_summary_are_those_of_the_models() -> None:
    dense = FFNs()
    shipped = sum(p.numel() for p in dense.parameters())
    model = exf.wrap(dense, num_experts=3)
    model.head.requires_grad_(False)
    summary = exf.summarize(model)
    training = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.head.parameters())
    assert summary.shipped_parameters == shipped
    assert summary.shipped_bytes == 4 * shipped
    assert summary.training_parameters == training
    assert summary.training_bytes == 4 * (4 * training - 3 * frozen)
    assert summary.fusion_parameters == 2 * 3 * 4
    assert summary.linears[0].shapes == {"weight": (6, 4), "bias": (6,)}


def test_a_summary_prints_as_a_table() -> None:
    text = str(exf.summarize(timm.create_model("deit_tiny_patch16_224")))
    assert text.startswith("ExFusion mb, 4 experts: 24 linears in 12 FFN groups\n")
    assert "blocks.0.mlp   blocks.0.mlp.fc1   768 x 192  4 x 768 x 192\n" in text
    assert "router or fusion weights: 9,216 parameters\n" in text
    assert text.endswith("shipped: 5,717,416 parameters, 21.8 MiB")


def test_settings_for_a_wrapped_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"wrapped already. Call summarize\(model\) by itself"):
        exf.summarize(exf.wrap(FFNs()), num_experts=8)


def test_metrics_say_what_the_experts_do() -> None:
    model = exf.wrap(FFNs(), momentum=0.9, num_experts=3)
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.0), lr=0.0)
    assert math.isnan(exf.metrics(model)["entropy/blocks.0"])
    for _ in range(4):
        loss_of(model, inputs().float()).backward()
        optimizer.step()
    values = exf.metrics(model)
    assert all(type(value) is float for value in values.values())
    name = "blocks.1"
    bank = model.blocks[1].fc1.parametrizations.weight[0].fusion_weights.bank
    assert [values[f"fusion_weights/{name}/{i}"] for i in range(3)] == bank.tolist()
    assert values[f"bank_mass/{name}"] == pytest.approx(1 - 0.9**4)
    shares = (bank / bank.sum()).tolist()
    entropy = -sum(share * math.log(share) for share in shares)
    assert values[f"entropy/{name}"] == pytest.approx(entropy, rel=1e-5)
    assert values[f"effective_experts/{name}"] == pytest.approx(math.exp(entropy), rel=1e-5)


def test_expert_distance_is_relative_to_the_mean_expert() -> None:
    model = exf.wrap(FFNs(depth=1), variant="sw", num_experts=2)
    with torch.no_grad():
        for linear in (model.blocks[0].fc1, model.blocks[0].fc2):
            stack = linear.parametrizations.weight.original
            stack[0].fill_(5.0)
            stack[1].fill_(3.0)
    assert exf.metrics(model)["expert_distance/blocks.0"] == pytest.approx(1 / 4)
    with torch.no_grad():
        for linear in (model.blocks[0].fc1, model.blocks[0].fc2):
            linear.parametrizations.weight.original.fill_(5.0)
    assert exf.metrics(model)["expert_distance/blocks.0"] == 0


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = FFNs(), FFNs()


def test_parts_that_were_wrapped_apart_are_reported_by_their_names_in_the_whole() -> None:
    model = TwoTowers()
    exf.wrap(model.image, variant="dw", num_experts=3)
    exf.wrap(model.text, variant="sw", num_experts=5)
    summary = exf.summarize(model)
    assert summary.num_groups == 4
    assert [config.num_experts for config in summary.configs] == [3, 5]
    assert [linear.num_experts for linear in summary.linears] == [3] * 4 + [5] * 4
    assert "ExFusion dw, 3 experts and ExFusion sw, 5 experts: 8 linears in 4 FFN groups" in str(
        summary
    )
    groups = {name.split("/")[1] for name in exf.metrics(model)}
    assert groups == {f"{part}.blocks.{i}" for part in ("image", "text") for i in range(2)}
    assert {name.split("/")[1] for name in exf.metrics(model.text)} == {"blocks.0", "blocks.1"}


def test_a_dry_run_leaves_the_draws_to_wrap() -> None:
    stacks = []
    for dry in (True, False):
        torch.manual_seed(0)
        model = FFNs()
        if dry:
            exf.summarize(model)
        exf.wrap(model)
        stacks.append(model.blocks[0].fc1.parametrizations.weight.original)
    assert torch.equal(*stacks)


def test_metrics_change_nothing() -> None:
    model = exf.wrap(FFNs(), bank_init="uniform")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exf.metrics(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("around", [lambda model: model, torch.compile])
def test_a_model_that_is_one_ffn_is_reported_by_its_class(around: Any) -> None:
    model = exf.wrap(timm.layers.Mlp(4, 6), num_experts=2, bank_init="uniform", seed=0)
    shown = around(model)
    with record_routing(model) as shares, torch.no_grad():
        model(torch.randn(3, 5, 4))
    row = exf.metrics(shown) | router_load(shares, torch.arange(3))
    assert {name.split("/")[1] for name in row} == {"Mlp"}
    assert {"fusion_weights/Mlp/0", "bank_mass/Mlp", "router_load/Mlp/2/1"} <= row.keys()
    history = {name: [value] for name, value in row.items()}
    for measure in ("fusion_weights", "router_load"):
        assert group_names(history, measure) == ["Mlp"]
        assert columns_of(history, measure, "Mlp")
    assert {linear.group for linear in exf.summarize(shown).linears} == {"Mlp"}
