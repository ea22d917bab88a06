"""Optimizers of other libraries, schedulers, clipping, layer-wise decay: recipes work unchanged."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import schedulefree
import timm
import timm.optim
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torchao.optim import AdamW8bit

import exfusion_param as exf
from exfusion_testing.banks import X, assert_bank, backward, bank_of, make, moved
from exfusion_testing.compilers import COMPILER
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.reference import reference_of

VARIANTS = ["sw", "dw", "mb"]
Optimizers = Callable[[nn.Module], torch.optim.Optimizer]


def twins(variant: str) -> tuple[nn.Module, nn.Module]:
    """A wrapped model, and the same one with its experts as linears of their own."""
    config = exf.ExFusionConfig(variant=variant, seed=0)  # type: ignore[arg-type]
    model = exf.wrap(FFNs().double(), config)
    return model, reference_of(model, config)


def assert_equal_outputs(model: nn.Module, reference: nn.Module) -> None:
    x = inputs(seed=99)
    torch.testing.assert_close(model.eval()(x), reference.eval()(x), rtol=0, atol=1e-9)


def end_step(reference: nn.Module) -> None:
    for block in reference.blocks:
        block.step()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_clipping_and_schedulers_see_the_experts_as_parameters(
    variant: str, set_to_none: bool
) -> None:
    model, reference = twins(variant)
    for net in (model, reference):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.1)
        warm_up, cosine = LinearLR(optimizer, 0.1, total_iters=3), CosineAnnealingLR(optimizer, 5)
        scheduler = SequentialLR(optimizer, [warm_up, cosine], [3])
        for step in range(8):
            loss_of(net, inputs(seed=step)).backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            assert norm > 0.1
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=set_to_none)
            if net is reference:
                end_step(reference)
    assert_equal_outputs(model, reference)


@pytest.mark.parametrize("variant", VARIANTS)
def test_schedule_free_averages_the_experts_as_parameters(variant: str) -> None:
    model, reference = twins(variant)
    for net in (model, reference):
        optimizer = schedulefree.AdamWScheduleFree(net.parameters(), lr=0.05, warmup_steps=2)
        optimizer.train()
        for step in range(6):
            loss_of(net, inputs(seed=step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if net is reference:
                end_step(reference)
        training = net.stem.weight.clone()
        optimizer.eval()  # puts the averages in place
        assert not torch.equal(training, net.stem.weight)
    assert_equal_outputs(model, reference)
    before = model(inputs())
    assert torch.equal(exf.fuse(model)(inputs()), before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_muon_takes_each_expert_as_a_matrix_in_the_stacks_memory(variant: str) -> None:
    model, reference = twins(variant)
    stacks = [p for name, p in model.named_parameters() if name.endswith("weight.original")]
    experts = [[nn.Parameter(expert) for expert in stack.detach()] for stack in stacks]
    matrices = [matrix for group in experts for matrix in group]
    inside = {id(stack) for stack in stacks}
    ours = [
        torch.optim.Muon(matrices, lr=0.05),
        torch.optim.AdamW([p for p in model.parameters() if id(p) not in inside], lr=0.01),
    ]
    theirs_matrices = [
        expert.weight for block in reference.blocks for linear in block.experts for expert in linear
    ]
    inside = {id(matrix) for matrix in theirs_matrices}
    theirs = [
        torch.optim.Muon(theirs_matrices, lr=0.05),
        torch.optim.AdamW([p for p in reference.parameters() if id(p) not in inside], lr=0.01),
    ]
    start = stacks[0].detach().clone()
    for seed in range(4):
        for net, optimizers in ((model, ours), (reference, theirs)):
            loss_of(net, inputs(seed=seed)).backward()
            if net is model:
                for stack, group in zip(stacks, experts, strict=True):
                    for matrix, gradient in zip(group, stack.grad, strict=True):
                        matrix.grad = gradient
            for optimizer in optimizers:
                optimizer.step()
            net.zero_grad()
        end_step(reference)
    assert (stacks[0] - start).abs().max() > 0.01
    # Newton-Schulz runs in bfloat16, where the order of a sum shows
    x = inputs(seed=99)
    torch.testing.assert_close(model.eval()(x), reference.eval()(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion", "adan", "adafactorbv", "nadamw"])
def test_timms_factory_takes_the_groups_and_the_bank_moves(name: str) -> None:
    model = make()
    optimizer = timm.optim.create_optimizer_v2(
        model, opt=name, lr=1e-3, param_group_fn=lambda model: exf.param_groups(model, 0.05)
    )
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    scheduler = CosineLRScheduler(optimizer, t_initial=4, warmup_t=2, warmup_lr_init=1e-5)
    start = copy.deepcopy(model.state_dict())
    for step in range(2):
        expected = moved(model, X[step])
        backward(model, X[step])
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(step)
        assert_bank(model, expected)
    assert not any(torch.equal(value, start[name]) for name, value in model.state_dict().items())


@pytest.mark.compiled
def test_torchaos_8_bit_adamw_trains_the_stacks_like_torchs() -> None:
    """It compiles its step: for minutes on some machines, and to the same numbers."""
    stance = "default" if COMPILER == "inductor" else "force_eager"

    def train(make_optimizer: Any) -> tuple[float, nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = exf.wrap(FFNs(dim=32, hidden=64), seed=0)  # states of 4096 elements are quantised
        optimizer = make_optimizer(exf.param_groups(model, 0.05), lr=1e-2)
        for _ in range(30):
            loss = loss_of(model, inputs(32).float())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item(), model, optimizer

    with torch.compiler.set_stance(stance):
        ours, model, optimizer = train(AdamW8bit)
    theirs, _, _ = train(torch.optim.AdamW)
    stack = model.blocks[0].fc1.parametrizations.weight.original
    assert type(optimizer.state[stack]["exp_avg"]).__name__ == "OptimState8bit"
    assert ours == pytest.approx(theirs, rel=0.05)
    assert bank_of(model).bank.sum().item() == pytest.approx(1 - 0.95**30, rel=1e-4)


def test_timms_layer_wise_decay_scales_each_stack_like_its_dense_weight() -> None:
    def scales(model: nn.Module) -> dict[str, tuple[float, float]]:
        groups = timm.optim.param_groups_layer_decay(
            model, 0.05, layer_decay=0.7, no_weight_decay_list=exf.no_weight_decay_names(model)
        )
        of = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
        named = dict(model.named_parameters())
        return {name: of[id(parameter)] for name, parameter in named.items()}

    dense = timm.create_model("vit_tiny_patch16_224", depth=3)
    expected, found = scales(dense), scales(exf.wrap(copy.deepcopy(dense)))
    assert len({scale for scale, _ in expected.values()}) == 5  # embedding, three blocks, head
    for name, value in expected.items():
        linear, _, tensor = name.rpartition(".")
        stack = f"{linear}.parametrizations.{tensor}.original"
        assert found.pop(stack if stack in found else name) == value, name
    routers = {name for name in found if name.endswith("router")}
    assert found.keys() == routers
    assert {scale for scale, _ in found.values()} < {scale for scale, _ in expected.values()}


@pytest.mark.parametrize(("variant", "count"), [("sw", 2), ("dw", 3), ("mb", 3)])
def test_fusion_weights_and_routers_have_a_learning_rate_of_their_own(
    variant: str, count: int
) -> None:
    model = exf.wrap(FFNs(), variant=variant)
    groups = exf.param_groups(model, 0.05, fusion_lr=0.3)
    assert len(groups) == count
    own = {id(p) for group in groups if "lr" in group for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in own}
    assert all(name.endswith(("router", "fusion_weights.weights")) for name in names)
    assert len(names) == (0 if variant == "sw" else 2)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert {group["lr"] for group in optimizer.param_groups} == (
        {0.1} if variant == "sw" else {0.1, 0.3}
    )
    with pytest.raises(ValueError, match="fusion_lr must be >= 0, got -1"):
        exf.param_groups(model, 0.05, fusion_lr=-1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_experts_frozen_for_some_steps_stand_still_and_train_on(variant: str) -> None:
    model, reference = twins(variant)
    for net in (model, reference):
        ffn = [p for block in net.blocks for p in block.parameters()]
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for step in range(6):
            for parameter in ffn:
                parameter.requires_grad_(not 2 <= step < 4)
            loss_of(net, inputs(seed=step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if net is reference and not 2 <= step < 4:  # a wholly frozen group's bank stands still
                end_step(reference)
            elif net is reference:
                for block in reference.blocks:
                    for seen in getattr(block, "seen", []):
                        seen.clear()
    assert_equal_outputs(model, reference)
