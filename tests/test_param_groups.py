"""`param_groups`: the order of its groups, and corrections of the user's groups."""

from typing import Any

import pytest
import timm
import timm.optim
import torch
from torch import nn

import exfusion_param as exf
from exfusion_testing.models import FFNs, inputs, loss_of

VARIANTS = ["sw", "dw", "mb"]


def wrapped(variant: str = "dw", **fields: Any) -> Any:
    return exf.wrap(FFNs(), variant=variant, bank_init="uniform", seed=0, **fields)


def names_of(model: nn.Module, group: dict[str, Any]) -> set[str]:
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name_of[id(parameter)] for parameter in group["params"]}


@pytest.mark.parametrize("fuse_on", ["forward", "step"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fusion_lr", [None, 0.1])
def test_the_decaying_group_comes_first(variant: str, fuse_on: Any, fusion_lr: Any) -> None:
    groups = exf.param_groups(wrapped(variant, fuse_on=fuse_on), 0.05, fusion_lr=fusion_lr)
    assert [group["weight_decay"] for group in groups[:2]] == [0.05, 0.0]
    assert all("lr" not in group for group in groups[:2])
    assert all(group["lr"] == fusion_lr for group in groups[2:])


def test_a_schedule_of_weight_decay_on_group_0_reaches_the_weights() -> None:
    model = wrapped()
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.04), lr=0.0)
    optimizer.param_groups[0]["weight_decay"] = 0.2  # as DINO does at each step
    weights = names_of(model, optimizer.param_groups[0])
    assert "blocks.0.fc1.parametrizations.weight.original" in weights
    assert not any("bias" in name for name in weights)


def is_exempt_by_shape(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim < 2


def is_exempt_by_name(name: str, parameter: torch.Tensor) -> bool:
    return name.endswith(".bias")


@pytest.mark.parametrize("rule", [is_exempt_by_shape, is_exempt_by_name])
@pytest.mark.parametrize("variant", VARIANTS)
def test_own_groups_lose_what_their_rule_could_not_know(variant: str, rule: Any) -> None:
    model = wrapped(variant)
    named = list(model.named_parameters())
    own = [
        {"params": [p for n, p in named if not rule(n, p)], "weight_decay": 0.1, "lr_scale": 0.5},
        {"params": [p for n, p in named if rule(n, p)], "weight_decay": 0.0, "lr_scale": 2.0},
    ]
    mended = exf.param_groups(model, groups=own)
    assert [group["weight_decay"] for group in mended] == [0.1, 0.0, 0.0]
    assert [group["lr_scale"] for group in mended] == [0.5, 2.0, 0.5]
    assert names_of(model, mended[1]) == names_of(model, own[1])
    moved = names_of(model, own[0]) - names_of(model, mended[0])
    assert moved == names_of(model, mended[2])
    learned = {n for n, _ in named if n.endswith("fusion_weights.weights") and not rule(n, _)}
    assert moved == {n for n, _ in named if "bias.original" in n} | learned
    optimizer = torch.optim.AdamW(mended)
    loss_of(model, inputs().float()).backward()
    optimizer.step()  # without a warning


def test_the_groups_of_an_optimizer_with_names_are_mended() -> None:
    model = wrapped()
    first = torch.optim.AdamW(model.named_parameters(), lr=0.5, weight_decay=0.1)
    mended = exf.param_groups(model, groups=first.param_groups)
    for group in mended:
        assert [id(model.get_parameter(n)) for n in group["param_names"]] == list(
            map(id, group["params"])
        )
    pairs = [{"params": list(model.named_parameters()), "weight_decay": 0.1}]
    second = torch.optim.AdamW(exf.param_groups(model, groups=pairs), lr=0.5)
    assert [group["weight_decay"] for group in second.param_groups] == [0.1, 0.0]
    assert [g["params"] for g in second.param_groups] == [g["params"] for g in mended]


def test_layer_decay_of_timm_keeps_its_scales_and_the_models_own_exemptions() -> None:
    dense = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32)
    rule = {"weight_decay": 0.05, "no_weight_decay_list": dense.no_weight_decay()}
    expected = {
        name: (group["weight_decay"], group["lr_scale"])
        for group in timm.optim.param_groups_layer_decay(dense, **rule)
        for name in names_of(dense, group)
    }
    model = exf.wrap(dense, variant="sw")
    mended = exf.param_groups(model, groups=timm.optim.param_groups_layer_decay(model, **rule))
    found = {
        name.replace("parametrizations.", "").replace(".original", ""): (
            group["weight_decay"],
            group["lr_scale"],
        )
        for group in mended
        for name in names_of(model, group)
    }
    assert found == expected


def test_stacks_that_the_model_exempts_or_a_glob_names_leave_groups_that_decay() -> None:
    class Exempting(FFNs):
        def no_weight_decay(self) -> set[str]:
            return {"blocks.0.fc1.weight", "head.weight"}

    model = exf.wrap(Exempting(), variant="sw")
    own = [{"params": list(model.parameters()), "weight_decay": 0.1}]
    first, second = exf.param_groups(model, groups=own, no_weight_decay=["stem.weight"])
    assert "blocks.0.fc1.parametrizations.weight.original" in names_of(model, second)
    assert "stem.weight" in names_of(model, second)
    assert "head.weight" in names_of(model, first)  # the rule of the groups knew its name


def test_fusion_weights_of_own_groups_get_their_learning_rate() -> None:
    model = wrapped("mb")
    own = [{"params": model.parameters(), "weight_decay": 0.1, "lr": 0.01}]
    groups = exf.param_groups(model, groups=own, fusion_lr=0.5)
    assert [group["lr"] for group in groups] == [0.01, 0.01, 0.5]
    assert {n for n, _ in model.named_parameters() if "router" in n} == names_of(model, groups[2])


def test_weight_decay_and_groups_exclude_each_other() -> None:
    for arguments, got in (({}, "neither"), ({"weight_decay": 0.1, "groups": []}, "both")):
        with pytest.raises(TypeError, match=f"either weight_decay or groups .*, got {got}"):
            exf.param_groups(wrapped(), **arguments)


def test_what_is_no_model_or_no_group_is_named() -> None:
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got generator"):
        exf.param_groups(wrapped().parameters(), 0.05)
    with pytest.raises(TypeError, match=r"dicts that have 'params', .* got Parameter. For one"):
        exf.param_groups(wrapped(), groups=wrapped().parameters())
    model = wrapped()
    assert len(exf.param_groups(model, groups=[{"params": model.parameters()}])) == 2
