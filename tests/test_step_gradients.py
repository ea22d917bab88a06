"""Under `fuse_on="step"`: gradients count wherever they come from, as on the dense model."""

import signal
from typing import Any

import pytest
import torch
from timm.optim import Adahessian
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_param.step.writes import Writes
from exfusion_testing.step_models import (
    EXACT,
    VARIANTS,
    Experts,
    adamw,
    assert_equals_oracle,
    assert_same,
    batch,
    dense_state,
    dense_twin,
    fusion_weights,
    loss_of,
    train,
    trained,
    wrapped,
)

X = batch(9)


def named_dense(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if "fusion_weights" not in n}


def ascend(model: nn.Module, rho: float = 0.1) -> tuple[float, float]:
    """The losses before and after an ascent of SAM on the dense parameters."""
    first = loss_of(model, X)
    first.backward()
    parameters = [p for p in named_dense(model).values() if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    with torch.no_grad():
        for p in parameters:
            p.add_(rho * p.grad / norm)
    model.zero_grad()
    return first.item(), loss_of(model, X).item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_ascent_of_sam_is_the_dense_models(variant: str) -> None:
    model = trained(variant)
    dense = dense_twin(model)
    assert_same(torch.tensor(ascend(model)), torch.tensor(ascend(dense)), 1e-14)
    assert_same(dense_state(model), dense_state(dense), 1e-14)


@pytest.mark.parametrize("variant", EXACT)
@pytest.mark.parametrize("restores", ["sub_", "data", "copy_"])
def test_training_by_sam_is_that_of_experts_with_the_fused_weight_moved(
    variant: str, restores: str
) -> None:
    model = wrapped(variant)
    oracle = Experts(model)
    ours = torch.optim.SGD(model.parameters(), lr=0.05)
    theirs = torch.optim.SGD(oracle.parameters(), lr=0.05)
    for seed in range(4):
        loss_of(model, batch(seed)).backward()
        before = {name: p.detach().clone() for name, p in named_dense(model).items()}
        moves = {name: 0.1 * p.grad for name, p in named_dense(model).items()}
        with torch.no_grad():
            for name, p in named_dense(model).items():
                p.add_(moves[name])
        model.zero_grad()
        loss_of(model, batch(seed)).backward()
        with torch.no_grad():
            for name, p in named_dense(model).items():
                if restores == "sub_":
                    p.sub_(moves[name])
                elif restores == "data":
                    p.data = before[name].clone()
                else:
                    p.copy_(before[name])
        ours.step()
        model.zero_grad()

        oracle.zero_grad()
        fused = {name: value + moves[name] for name, value in oracle.fused().items()}
        y = torch.func.functional_call(oracle.dense, fused, (batch(seed),))
        (y.square() + y.sin()).mean().backward()
        theirs.step()
    assert_equals_oracle(model, oracle, 1e-9)


def l2(model: Any) -> Tensor:
    return sum(p.square().sum() for p in named_dense(model).values())


def of_fused(oracle: Experts) -> Tensor:
    return sum(value.square().sum() for value in oracle.fused().values())


@pytest.mark.parametrize("variant", EXACT)
def test_a_penalty_on_weights_counts(variant: str) -> None:
    model = wrapped(variant)
    oracle = Experts(model)
    ours, theirs = adamw(model), torch.optim.AdamW(oracle.parameters(), lr=0.02)
    for seed in range(5):
        model.zero_grad()
        (loss_of(model, batch(seed)) + 0.1 * l2(model)).backward()
        ours.step()
        oracle.zero_grad()
        (loss_of(oracle, batch(seed)) + 0.1 * of_fused(oracle)).backward()
        theirs.step()
    assert_equals_oracle(model, oracle)


def test_a_penalty_on_learned_weights_is_added_to_their_gradient() -> None:
    model = wrapped("dw")
    oracle = Experts(model)
    ours, theirs = adamw(model), torch.optim.AdamW(oracle.parameters(), lr=0.02)
    for seed in range(5):
        model.zero_grad()
        learned = [weights.weights for weights in fusion_weights(model)]
        (loss_of(model, batch(seed)) + sum((w - 0.5).square().sum() for w in learned)).backward()
        ours.step()
        oracle.zero_grad()
        learned = oracle.learned()
        (loss_of(oracle, batch(seed)) + sum((w - 0.5).square().sum() for w in learned)).backward()
        theirs.step()
    assert_equals_oracle(model, oracle)


def test_a_penalty_on_routers_is_added_to_their_gradient() -> None:
    models = [wrapped("mb"), wrapped("mb")]
    gradients = []
    for model, strength in zip(models, (0.0, 0.3), strict=True):
        before = [w.router.detach().clone() for w in fusion_weights(model)]
        penalty = sum(w.router.square().sum() / 2 for w in fusion_weights(model))
        (loss_of(model, X) + strength * penalty).backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        after = [w.router.detach() for w in fusion_weights(model)]
        gradients.append([a - b for a, b in zip(before, after, strict=True)])
    routers = [w.router.detach() for w in fusion_weights(wrapped("mb"))]
    for without, with_penalty, router in zip(*gradients, routers, strict=True):
        assert_same(with_penalty - without, 0.3 * router, 1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_do_not_add_up_for_an_optimizer_over_chosen_parameters(variant: str) -> None:
    model = wrapped(variant)
    chosen = [p for name, p in model.named_parameters() if "fc1" in name or "head" in name]
    optimizer = torch.optim.SGD(chosen, lr=0.0)
    norms = []
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model, X).backward()
        optimizer.step()
        norms.append(model.blocks[0].fc1.weight.grad.norm())
    assert_same(norms[1:], norms[:1] * 3, 1e-12 if variant != "mb" else 1.0)


@pytest.mark.parametrize("variant", EXACT)
def test_an_optimizer_over_chosen_parameters_trains_those_as_the_oracle(variant: str) -> None:
    model = wrapped(variant)
    oracle = Experts(model)
    ours = adamw(model)
    chosen = [p for n, p in model.named_parameters() if "fc1" in n or "head" in n]
    ours = torch.optim.AdamW(chosen, lr=0.02)
    leaves = [p for n, own in oracle.leaves.items() if "fc1" in n for p in own]
    head = [p for n, p in oracle.plain().items() if "head" in n]
    theirs = torch.optim.AdamW([*leaves, *head], lr=0.02)
    for seed in range(4):
        for each, optimizer in ((model, ours), (oracle, theirs)):
            optimizer.zero_grad()
            loss_of(each, batch(seed)).backward()
            optimizer.step()
    assert_equals_oracle(model, oracle)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_a_tensor_hook_masks_stay(variant: str) -> None:
    model = wrapped(variant)
    mask = torch.ones(16, 1).double()
    mask[:5] = 0
    model.blocks[0].fc1.weight.register_hook(lambda gradient: gradient * mask)
    before = model.blocks[0].fc1.weight.detach().clone()
    train(model, torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0))
    moved = (model.blocks[0].fc1.weight.detach() - before).abs().amax(1)
    if variant != "mb":  # whose bank moves all rows
        assert moved[:5].max() < 1e-15 or variant == "dw"
    assert moved[5:].min() > 1e-3
    if variant == "dw":  # the experts stay, and move only with the learned weights
        model = wrapped("dw")
        model.blocks[0].fc1.weight.register_hook(lambda gradient: gradient * mask)
        fused = fusion_weights(model)[0].fused[0]
        start = fused.experts().clone()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
        train(model, optimizer)
        assert_same(fused.experts()[:, :5], start[:, :5], 1e-15)


def inner_loop(model: nn.Module) -> Tensor:
    """The loss after two inner steps of MAML, differentiated with respect to the start."""
    parameters = named_dense(model)
    fast: dict[str, Tensor] = dict(parameters)
    for seed in range(2):
        y = torch.func.functional_call(model, fast, (batch(seed),))
        gradients = torch.autograd.grad(y.square().mean(), list(fast.values()), create_graph=True)
        fast = {n: p - 0.1 * g for (n, p), g in zip(fast.items(), gradients, strict=True)}
    return torch.func.functional_call(model, fast, (batch(5),)).square().mean()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_meta_gradient_of_maml_is_the_dense_models(variant: str) -> None:
    model = trained(variant)
    dense = dense_twin(model)
    for each in (model, dense):
        inner_loop(each).backward()
    assert_same(
        {name: p.grad for name, p in named_dense(model).items()},
        {name: p.grad for name, p in dense.named_parameters()},
        1e-14,
    )


@pytest.mark.parametrize("variant", EXACT)
def test_maml_trains_as_the_oracle(variant: str) -> None:
    model = wrapped(variant)
    oracle = Experts(model)
    ours, theirs = adamw(model), torch.optim.AdamW(oracle.parameters(), lr=0.02)
    for _ in range(3):
        model.zero_grad()
        inner_loop(model).backward()
        ours.step()
        oracle.zero_grad()
        fused = oracle.fused()
        fast = fused
        for seed in range(2):
            y = torch.func.functional_call(oracle.dense, fast, (batch(seed),))
            values = list(fast.values())
            gradients = torch.autograd.grad(y.square().mean(), values, create_graph=True)
            fast = {n: p - 0.1 * g for (n, p), g in zip(fast.items(), gradients, strict=True)}
        torch.func.functional_call(oracle.dense, fast, (batch(5),)).square().mean().backward()
        theirs.step()
    assert_equals_oracle(model, oracle)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_adahessian_is_refused_with_the_way_out() -> None:
    model = wrapped("dw")
    optimizer = Adahessian(model.parameters(), lr=0.02)
    loss_of(model, X).backward(create_graph=True)
    before = dense_state(model)
    with pytest.raises(RuntimeError, match="create_graph=True.*forward"):
        optimizer.step()
    assert_same(dense_state(model), before, 0)
    model.zero_grad()


def interrupt(*_: Any) -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("make", [torch.optim.AdamW, exf.ExpertAdamW, torch.optim.Adafactor])
def test_an_interrupt_within_a_step_takes_effect_after_it(
    variant: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tests may run where Ctrl-C is ignored, as in the background of a shell.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    model, twin = wrapped(variant), wrapped(variant)
    optimizers = [make(each.parameters(), lr=0.02) for each in (model, twin)]
    train(twin, optimizers[1], range(4))
    train(model, optimizers[0], range(2))
    give = Writes.take
    with monkeypatch.context() as patch:
        patch.setattr(Writes, "take", lambda *args: (interrupt(), give(*args))[1])
        loss_of(model, batch(2)).backward()
        with pytest.raises(KeyboardInterrupt):
            optimizers[0].step()
    signal.signal(signal.SIGINT, before)
    model.zero_grad()
    train(model, optimizers[0], [3])
    assert_same(model.state_dict(), twin.state_dict(), 0)
