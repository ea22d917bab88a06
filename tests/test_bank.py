"""The memory bank moves once per optimizer step, whatever the training loop looks like."""

import copy

import pytest
import torch
from torch import Tensor

import exfusion_param as exf
from exfusion_param.tensors import functional
from exfusion_testing.banks import (
    MOMENTUM,
    X,
    adamw,
    assert_bank,
    assert_bank_follows,
    backward,
    bank_of,
    make,
    moved,
)
from exfusion_testing.models import Checkpointing, FFNs, loss_of

CHECKPOINTING: list[Checkpointing | None] = [None, "reentrant", "non-reentrant"]


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_moves_once_by_the_mean_of_different_micro_batches(
    checkpointing: Checkpointing | None,
) -> None:
    model = make(checkpointing=checkpointing)
    optimizer = adamw(model)
    for _ in range(3):
        expected = moved(model, *X)
        before = bank_of(model).bank.clone()
        backward(model, *X)
        assert_bank(model, before)  # not before the step
        optimizer.step()
        assert_bank(model, expected)
        optimizer.zero_grad()


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_two_forwards_before_one_backward_both_count(checkpointing: Checkpointing | None) -> None:
    model = make(checkpointing=checkpointing)
    optimizer = adamw(model)
    for _ in range(2):
        expected = moved(model, X[0], X[1])
        (loss_of(model, X[0]) + loss_of(model, X[1])).backward()
        optimizer.step()
        assert_bank(model, expected)
        optimizer.zero_grad()


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_forward_without_a_backward_does_not_count(checkpointing: Checkpointing | None) -> None:
    model = make(checkpointing=checkpointing)
    optimizer = adamw(model)
    expected = moved(model, X[0])
    loss_of(model, X[1])
    backward(model, X[0])
    loss_of(model, X[2])
    optimizer.step()
    assert_bank(model, expected)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_backward_whose_gradient_is_dropped_does_not_count(
    to_none: bool, checkpointing: Checkpointing | None
) -> None:
    model = make(checkpointing=checkpointing)
    optimizer = adamw(model)
    expected = moved(model, X[0], X[2])
    backward(model, X[1], X[3])
    model.zero_grad(set_to_none=to_none)
    backward(model, X[0], X[2])
    optimizer.step()
    assert_bank(model, expected)


def test_zero_grad_between_forward_and_backward() -> None:
    model = make()
    optimizer = adamw(model)
    backward(model, X[3])  # no step follows
    expected = moved(model, X[0])
    loss = loss_of(model, X[0])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert_bank(model, expected)


def test_a_step_without_a_backward_moves_nothing() -> None:
    model = make()
    optimizer = adamw(model)
    backward(model, X[0])
    optimizer.step()
    expected = bank_of(model).bank.clone()
    optimizer.step()
    assert_bank(model, expected)


def test_eval_and_no_grad_forwards_leave_it_alone() -> None:
    model = make()
    optimizer = adamw(model)
    expected = moved(model, X[0])
    with torch.no_grad():
        model(X[1])
    model.eval()
    model(X[2]).sum().backward()
    model.train()
    optimizer.zero_grad()
    backward(model, X[0])
    optimizer.step()
    assert_bank(model, expected)


def test_eval_fuses_with_the_bank_and_training_with_the_moved_one() -> None:
    model = make()
    bank, x = bank_of(model), X[0]
    experts = model.blocks[0].fc1.parametrizations.weight.original
    seen = []
    model.blocks[0].fc1.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(x)
        model.eval()(x)
        h, bias = model.stem(x), model.blocks[0].fc1.parametrizations.bias.original
        for output, weights in zip(seen, (moved(model, x), bank.bank), strict=True):
            fused = functional.fuse(experts, weights), functional.fuse(bias, weights)
            expected = torch.nn.functional.linear(h, *fused)
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_several_optimizers_move_it_once() -> None:
    model = make()
    stacks = [p for name, p in model.named_parameters() if "original" in name]
    rest = [p for name, p in model.named_parameters() if "original" not in name]
    optimizers = torch.optim.SGD(stacks, lr=0.1), torch.optim.AdamW(rest, lr=0.1)
    for _ in range(3):
        expected = moved(model, X[0])
        backward(model, X[0])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_bank(model, expected)


def test_an_optimizer_of_another_model_does_not_move_it() -> None:
    model, other = make(), make()
    expected = bank_of(model).bank.clone()
    backward(model, X[0])
    backward(other, X[0])
    adamw(other).step()
    assert_bank(model, expected)


def test_the_last_evaluation_of_a_closure_counts() -> None:
    model = make()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    evaluated = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        evaluated.append(moved(model, X[0]))
        loss = loss_of(model, X[0])
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(evaluated) > 1
    assert_bank(model, evaluated[-1])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_that_grad_scaler_skips_does_not_move_it(fused: bool, set_to_none: bool) -> None:
    model = make().float()
    optimizer = adamw(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    xs = [x.float() for x in X]
    before = {name: value.clone() for name, value in model.state_dict().items()}

    scaler.scale(loss_of(model, xs[0])).backward()
    model.head.weight.grad.fill_(float("inf"))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=set_to_none)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name

    expected = moved(model, xs[1])
    scaler.scale(loss_of(model, xs[1])).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(bank_of(model).bank, expected)


@pytest.mark.parametrize("frozen", ["router", "router and stem", "experts"])
def test_frozen_parts_do_not_keep_it_from_moving(frozen: str) -> None:
    model = make()
    bank_of(model).router.requires_grad_("router" not in frozen)
    model.stem.requires_grad_("stem" not in frozen)
    for name, parameter in model.named_parameters():
        if "original" in name:
            parameter.requires_grad_(frozen != "experts")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert_bank_follows(model, optimizer)


def test_a_wholly_frozen_group_does_not_move_and_costs_no_backward() -> None:
    model = make()
    model.blocks.requires_grad_(False)
    model.stem.requires_grad_(False)
    expected = bank_of(model).bank.clone()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    x = X[0]
    assert not model.blocks[0](model.stem(x)).requires_grad
    backward(model, x)
    optimizer.step()
    assert_bank(model, expected)


def test_one_group_called_several_times_moves_once_by_the_mean_of_its_calls() -> None:
    model = make()
    optimizer = adamw(model)
    block, x = model.blocks[0], X[0]
    with torch.no_grad():
        first = functional.route(x, bank_of(model).router)
        second = functional.route(block(x), bank_of(model).router)
    expected = MOMENTUM * bank_of(model).bank + (1 - MOMENTUM) * (first + second) / 2
    block(block(x)).square().mean().backward()
    optimizer.step()
    assert_bank(model, expected)


def test_an_empty_batch_has_no_vote() -> None:
    model = make()
    optimizer = adamw(model)
    empty = X[0][:0]
    assert model(empty).shape == (0, 3, 3)
    expected = moved(model, X[0])
    (model(empty).sum() + loss_of(model, X[0])).backward()
    optimizer.step()
    assert_bank(model, expected)


def test_a_linear_that_runs_before_the_routers_input_is_known_is_refused() -> None:
    model = make()
    hidden = torch.randn(2, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="'blocks.0' ran without .* shared_router=False"):
        model.blocks[0].fc2(hidden)
    model.eval().blocks[0].fc2(hidden)


def test_reading_a_weight_while_training_gives_what_would_be_shipped() -> None:
    model = make()
    backward(model, X[0])
    linear = model.blocks[0].fc1
    shipped = functional.fuse(linear.parametrizations.weight.original, bank_of(model).bank)
    assert torch.equal(linear.weight, shipped)


def test_a_forward_that_was_cut_short_does_not_show_in_what_is_shipped() -> None:
    model = make()
    model.blocks[0].fc1(X[0])  # and here comes an exception, or Ctrl-C
    assert bank_of(model).current is not None
    assert bank_of(copy.deepcopy(model)).current is None
    expected = exf.fuse(copy.deepcopy(model)).blocks[0].fc1.weight
    assert torch.equal(exf.fused_state_dict(model)["blocks.0.fc1.weight"], expected)
    model.blocks[0].fc1(X[0])
    model.eval()
    assert torch.equal(model.blocks[0].fc1.weight, expected)
    model(X[0])
    assert bank_of(model).current is None
    with pytest.raises(RuntimeError):
        model.train().blocks[0].fc2(model.blocks[0].fc1(X[0])[..., :3])
    assert bank_of(model).current is None


def test_a_copy_taken_between_backward_and_step_starts_without_counts_as_without_gradients() -> (
    None
):
    model = make()
    for_both, for_copy = moved(model, X[0], X[1]), moved(model, X[1])
    backward(model, X[0])
    replica = copy.deepcopy(model)
    for trained, expected in ((model, for_both), (replica, for_copy)):
        backward(trained, X[1])
        adamw(trained).step()
        assert_bank(trained, expected)


def test_a_skipped_step_of_a_copy_or_of_replaced_parameters_does_not_count() -> None:
    replica = copy.deepcopy(make())
    replaced = make()
    replaced.load_state_dict(copy.deepcopy(replaced.state_dict()), assign=True)
    for model in (replica, replaced):
        expected = moved(model, X[0])
        backward(model, X[1])
        model.zero_grad()
        backward(model, X[0])
        adamw(model).step()
        assert_bank(model, expected)


def test_a_router_starts_as_a_linear_does() -> None:
    router = bank_of(exf.wrap(FFNs(dim=64, hidden=65, depth=1), num_experts=8, seed=0)).router
    bound = 1 / 8  # 1 / sqrt(D)
    assert 0.95 * bound < router.abs().max() <= bound


def test_experts_fuse_to_an_assigned_weight_under_a_bank_that_is_filled_in_part() -> None:
    model = make()
    filled = torch.tensor([0.1, 0.2, 0.0, 0.1])
    bank_of(model).bank.copy_(filled)
    torch.testing.assert_close(bank_of(model).start(), filled.to(bank_of(model).bank))
    linear = bank_of(model).linears[0]
    weight = torch.randn_like(linear.weight)
    linear.weight = weight
    torch.testing.assert_close(linear.weight, weight)
