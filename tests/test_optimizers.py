"""Parameter groups, and optimizers that do not fit the wrapped model."""

import warnings
from typing import Any

import pytest
import timm.optim
import torch
from torch import nn

import exfusion_param as exf
from exfusion_testing.models import FFNs, inputs, loss_of


def names_by_decay(model: nn.Module, **kwargs: Any) -> dict[float, set[str]]:
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = exf.param_groups(model, 0.05, **kwargs)
    assert sum(len(group["params"]) for group in groups) == len(name_of)
    return {group["weight_decay"]: {name_of[id(p)] for p in group["params"]} for group in groups}


@pytest.mark.parametrize("variant", ["sw", "dw", "mb"])
def test_biases_and_fusion_weights_do_not_decay(variant: str) -> None:
    model = exf.wrap(FFNs(depth=1), variant=variant)
    fc1 = "blocks.0.fc1.parametrizations"
    decayed = {
        "stem.weight",
        "head.weight",
        f"{fc1}.weight.original",
        "blocks.0.fc2.parametrizations.weight.original",
    }
    if variant == "mb":
        decayed.add(f"{fc1}.weight.0.fusion_weights.router")
    assert names_by_decay(model)[0.05] == decayed


@pytest.mark.parametrize("wrapped", [True, False])
def test_groups_are_timms_but_for_what_a_stack_hides(wrapped: bool) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    skipped = model.no_weight_decay()
    if wrapped:
        exf.wrap(model, variant="sw")
    ours = names_by_decay(model)
    theirs = timm.optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=skipped)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in theirs:
        expected = {name_of[id(p)] for p in group["params"]}
        if wrapped:  # timm takes a stacked bias for a matrix
            biases = {name for name in name_of.values() if "bias.original" in name}
            expected = expected - biases if group["weight_decay"] else expected | biases
        assert ours[group["weight_decay"]] == expected


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = exf.wrap(FFNs(depth=1))
    model.stem.requires_grad_(False)
    names = {id(p) for group in exf.param_groups(model, 0.05) for p in group["params"]}
    assert names == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(exf.param_groups(nn.Linear(2, 2, bias=False), 0.05)) == 1


def test_globs_exempt_more_and_a_negative_decay_is_refused() -> None:
    model = exf.wrap(FFNs(depth=1))
    assert "head.weight" in names_by_decay(model, no_weight_decay=["head.*", "*.router"])[0.0]
    assert names_by_decay(model, no_weight_decay="*.router")[0.05]
    exempt = names_by_decay(model, no_weight_decay=["blocks.0.fc1.weight"])[0.0]
    assert "blocks.0.fc1.parametrizations.weight.original" in exempt
    with pytest.raises(ValueError, match="glob '.*routers' in no_weight_decay matches no param"):
        exf.param_groups(model, 0.1, no_weight_decay=["*.routers"])
    for decay in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="weight_decay must be >= 0, got"):
            exf.param_groups(model, decay)


@pytest.mark.parametrize(
    "kwargs",
    [{"foreach": True}, {"fused": True}, {"foreach": False, "amsgrad": True}],
)
def test_an_optimizer_with_state_from_before_wrap_is_refused_before_it_steps(
    kwargs: dict[str, Any],
) -> None:
    model = FFNs()
    optimizer = torch.optim.AdamW(model.parameters(), **kwargs)
    loss_of(model, inputs().float()).backward()
    optimizer.step()
    exf.wrap(model, variant="sw")
    loss_of(model, inputs().float()).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"AdamW holds state .* Make the optimizer after wrap"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_optimizer_with_state_from_before_fuse_raises_and_never_trains_on_silently() -> None:
    model = exf.wrap(FFNs(), variant="sw")
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model, inputs().float()).backward()
    optimizer.step()
    optimizer.zero_grad()
    exf.fuse(model)
    loss_of(model, inputs().float()).backward()
    with pytest.raises(RuntimeError, match="shape|size"):
        optimizer.step()


@pytest.mark.parametrize("variant", ["dw", "mb"])
def test_an_optimizer_without_the_fusion_weights_warns_once(variant: str) -> None:
    model = exf.wrap(FFNs(depth=1), variant=variant)
    others = [p for name, p in model.named_parameters() if "fusion_weights" not in name]
    optimizer = torch.optim.SGD(others, lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(25):
            loss_of(model, inputs().float()).backward()
            optimizer.step()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1
    assert "'blocks.0' are in no optimizer that has stepped" in messages[0]


@pytest.mark.parametrize("variant", ["sw", "dw", "mb"])
def test_an_optimizer_from_before_wrap_is_refused_if_it_lacks_fusion_weights(variant: str) -> None:
    model = FFNs(depth=1)
    early = torch.optim.SGD(model.parameters(), lr=0.1)  # without state
    exf.wrap(model, variant=variant, bank_init="uniform")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss_of(model, inputs().float()).backward()
    if variant == "sw":
        early.step()
        after = model.state_dict()
        assert not any(torch.equal(after[name], value) for name, value in before.items())
        return
    with pytest.raises(RuntimeError, match=r"SGD was made before wrap\(\). Make"):
        early.step()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model.state_dict()["head.weight"], before["head.weight"])


def test_fusion_weights_in_an_optimizer_of_their_own_do_not_warn() -> None:
    model = exf.wrap(FFNs())
    own = {name for name, _ in model.named_parameters() if "router" in name}
    routers = [p for name, p in model.named_parameters() if name in own]
    rest = [p for name, p in model.named_parameters() if name not in own]
    optimizers = torch.optim.SGD(rest, lr=0.1), torch.optim.SGD(routers, lr=0.01)
    for _ in range(25):
        loss_of(model, inputs().float()).backward()
        for optimizer in optimizers:
            optimizer.step()


def test_an_optimizer_for_each_kind_of_parameter_does_not_warn() -> None:
    model = exf.wrap(FFNs())
    kinds: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        kinds.setdefault(name.rsplit(".", 2)[-2], []).append(parameter)
    optimizers = [torch.optim.SGD(parameters, lr=0.1) for parameters in kinds.values()]
    assert len(optimizers) > 3
    for _ in range(12):
        loss_of(model, inputs().float()).backward()
        for optimizer in optimizers:
            optimizer.step()


def test_muon_takes_the_dense_matrices_and_another_optimizer_the_stacks() -> None:
    model = exf.wrap(FFNs(), variant="dw")
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon(model.parameters())
    matrices = [p for n, p in model.named_parameters() if n.endswith(".weight")]
    rest = [p for n, p in model.named_parameters() if not n.endswith(".weight")]
    optimizers = torch.optim.Muon(matrices), torch.optim.AdamW(rest)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss_of(model, inputs().float()).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert not any(torch.equal(value, before[n]) for n, value in model.state_dict().items())


@pytest.mark.parametrize(("variant", "spread"), [("sw", 1e-5), ("dw", 0.05), ("mb", 0.1)])
def test_under_adamw_the_experts_move_almost_alike(variant: str, spread: float) -> None:
    model = exf.wrap(FFNs(dim=8, hidden=16), variant=variant, bank_init="uniform", seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    stack = model.blocks[0].fc1.parametrizations.weight.original
    start = stack.detach().clone()
    for step in range(100):
        optimizer.zero_grad()
        loss_of(model, inputs(8, seed=step).float()).backward()
        optimizer.step()
    moved = stack.detach() - start
    mean = moved.mean(0)
    assert mean.norm() > 0.1
    assert (moved - mean).norm(dim=(1, 2)).mean() / mean.norm() < spread


def test_adafactors_factored_state_is_not_taken_for_stale() -> None:
    model = exf.wrap(FFNs())
    optimizer = torch.optim.Adafactor(model.parameters())
    for _ in range(2):
        loss_of(model, inputs().float()).backward()
        optimizer.step()
