"""The bank counts a micro-batch with its gradient: what no step applies does not move it."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import exfusion_param as exf
from exfusion_testing.banks import (
    X,
    adamw,
    assert_bank,
    assert_bank_follows,
    backward,
    bank_of,
    make,
    moved,
)
from exfusion_testing.models import FFNs, inputs, loss_of


def test_a_gradient_that_goes_elsewhere_does_not_count() -> None:
    model = make()
    optimizer = adamw(model)
    for _ in range(2):
        expected = moved(model, X[0], X[3])
        x = X[1].clone().requires_grad_()
        torch.autograd.grad(loss_of(model, x), x)  # an adversarial or saliency pass
        backward(model, X[0])
        torch.autograd.grad(loss_of(model, x), x)
        backward(model, X[3])
        optimizer.step()
        assert_bank(model, expected)
        assert not bank_of(model).votes._backwards
        optimizer.zero_grad()


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory left")


def test_a_backward_that_fails_does_not_count() -> None:
    model = make()
    optimizer = adamw(model)
    expected = moved(model, X[1])
    hook = model.stem.register_forward_hook(lambda module, args, output: Failing.apply(output))
    with pytest.raises(torch.OutOfMemoryError):
        backward(model, X[0])
    hook.remove()
    optimizer.zero_grad()
    backward(model, X[1])
    optimizer.step()
    assert_bank(model, expected)


@pytest.mark.parametrize("to_none", [True, False])
def test_micro_batches_whose_gradient_is_zero_count(to_none: bool) -> None:
    model = make()
    nn.init.zeros_(model.head.weight)  # so that nothing reaches the router at the first step
    optimizer = adamw(model)
    for _ in range(2):
        expected = moved(model, *X)
        for x in X:
            (model(x) + 1).square().mean().backward()
        optimizer.step()
        assert_bank(model, expected)
        optimizer.zero_grad(set_to_none=to_none)


def test_a_gradient_penalty_trains_and_counts_its_micro_batch_once() -> None:
    model = make()
    optimizer = adamw(model)
    expected = moved(model, X[0], X[1])
    x = X[0].clone().requires_grad_()
    loss = loss_of(model, x)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + gradient.square().sum()).backward()
    backward(model, X[1])
    optimizer.step()
    assert_bank(model, expected)


def test_second_derivatives_are_those_of_the_plain_function() -> None:
    model = make()
    x = X[0].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: model(x).square().mean(), (x,))


def test_functional_call_with_parameters_that_are_no_leaves() -> None:
    model = make()
    doubled = {name: 2 * parameter for name, parameter in model.named_parameters()}
    torch.func.functional_call(model, doubled, (X[0],)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_over_half_an_ffn_is_refused_and_with_own_routers_works(
    reentrant: bool,
) -> None:
    for shared_router in (True, False):
        block = exf.wrap(FFNs(depth=1).double(), shared_router=shared_router).blocks[0]
        x = X[0].clone().requires_grad_()
        hidden = block.fc1(x)

        def second_half(hidden: Tensor, block: nn.Module = block) -> Tensor:
            return block.fc2(block.act(hidden))

        def train(hidden: Tensor = hidden) -> None:
            checkpoint(second_half, hidden, use_reentrant=reentrant).sum().backward()

        if shared_router:
            with pytest.raises(RuntimeError, match="Checkpoint the whole FFN, or give"):
                train()
        else:
            train()


def test_a_reentrant_checkpoint_over_the_first_half_is_refused() -> None:
    block = make().blocks[0]
    x = X[0].clone().requires_grad_()
    hidden = checkpoint(lambda x: block.act(block.fc1(x)), x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="outside of its checkpoint"):
        block.fc2(hidden)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_dropped_model_leaves_nothing_behind(frozen: bool) -> None:
    model = make()
    bank_of(model).router.requires_grad_(not frozen)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    backward(model, X[0])
    optimizer.step()
    references = [weakref.ref(parameter) for parameter in model.parameters()]
    del model, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: torch.optim.AdamW(p, foreach=True),
        lambda p: torch.optim.AdamW(p, foreach=False),
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adafactor(p),
    ],
)
def test_every_optimizer_moves_it(make_optimizer: Any) -> None:
    model = make()
    optimizer = make_optimizer(model.parameters())
    assert_bank_follows(model, optimizer)


def test_an_accumulation_that_grad_scaler_skips_does_not_count_in_either_optimizer() -> None:
    model = make().float()
    xs = [x.float() for x in X]
    head = torch.optim.SGD(model.head.parameters(), lr=0.1)
    rest = torch.optim.SGD([*model.stem.parameters(), *model.blocks.parameters()], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for poisoned in (True, False):
        bank = bank_of(model).bank.clone()
        expected = bank if poisoned else moved(model, xs[2], xs[3])
        for x in xs[:2] if poisoned else xs[2:]:
            scaler.scale(loss_of(model, x)).backward()
        if poisoned:
            model.stem.weight.grad.fill_(float("inf"))
        for optimizer in (head, rest):
            scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(bank_of(model).bank, expected)
        for optimizer in (head, rest):
            optimizer.zero_grad()


def test_one_token_without_a_batch_trains() -> None:
    model = make()
    expected = moved(model, X[0][:1, :1])
    model(X[0][0, 0]).sum().backward()
    adamw(model).step()
    assert_bank(model, expected)


def test_inputs_by_keyword_reach_the_router() -> None:
    block = make().blocks[0]
    x = inputs().double()
    plain = block.fc2(block.fc1(x)[..., :6])
    assert torch.equal(block.fc2(input=block.fc1(input=x)[..., :6]), plain)


class Bypassing(nn.Module):
    """Reads a weight without calling its linear."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.linear.weight, self.linear.bias)


@pytest.mark.parametrize("fuse_on", ["forward", "step"])
def test_a_router_that_never_sees_an_input_warns_once(fuse_on: Any) -> None:
    model = exf.wrap(Bypassing(), filter_fn=["linear"], fuse_on=fuse_on)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 4)).sum().backward()
    with pytest.warns(UserWarning, match="router has seen no input"):
        optimizer.step()
    optimizer.step()


def directional(model: nn.Module) -> dict[str, Tensor]:
    """The derivative of the summed output along ones, by forward-mode differentiation."""
    return {
        "jvp": torch.func.jvp(lambda x: model(x).sum(), (X[0],), (torch.ones_like(X[0]),))[1],
        "jacfwd": torch.func.jacfwd(lambda x: model(x).sum())(X[0]).sum(),
    }


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("shared_router", [True, False])
def test_forward_mode_is_refused_in_training_and_right_in_eval_and_under_step(
    shared_router: bool,
) -> None:
    def wrapped(fuse_on: Any = "forward") -> nn.Module:
        settings: Any = {"bank_init": "uniform", "seed": 0, "fuse_on": fuse_on}
        return exf.wrap(FFNs(depth=1).double(), shared_router=shared_router, **settings)

    def ones(x: Tensor) -> Tensor:
        return torch.ones_like(x)

    model, x = wrapped(), X[0]
    parameters = dict(model.named_parameters())
    for run in (
        lambda: torch.func.jvp(model, (x,), (ones(x),)),
        lambda: torch.func.jacfwd(model)(x),
        lambda: torch.func.grad(lambda x: model(x).sum())(x),
        lambda: torch.func.grad(lambda p: torch.func.functional_call(model, p, x).sum())(
            parameters
        ),
    ):
        with pytest.raises(RuntimeError, match=r"router of 'blocks.*Call model.eval\(\)"):
            run()
    for other in (wrapped().eval(), wrapped("step"), wrapped("step").eval()):
        x = X[0].clone().requires_grad_()
        (expected,) = torch.autograd.grad(other(x).sum(), x)
        for value in directional(other).values():
            torch.testing.assert_close(value, expected.sum())


@pytest.mark.parametrize("fuse_on", ["forward", "step"])
def test_a_forward_with_two_backwards_counts_as_two_micro_batches(fuse_on: Any) -> None:
    model = make(fuse_on=fuse_on)
    expected = moved(model, X[0], X[0], X[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    y = model(X[0])
    y.square().mean().backward(retain_graph=True)
    y.sin().mean().backward()
    backward(model, X[1])
    optimizer.step()
    assert_bank(model, expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fuse_on", ["forward", "step"])
def test_gradients_of_single_samples_by_torch_func_move_no_bank_and_say_so(
    fuse_on: Any, training: bool
) -> None:
    model = make(fuse_on=fuse_on).train(training)
    if fuse_on == "forward" and training:
        with pytest.raises(RuntimeError, match=r"torch.func .* Call model.eval\(\)"):
            private_step(model)
        return
    with pytest.warns(UserWarning, match="router has seen no input.* or has gradients from"):
        private_step(model)


def private_step(model: nn.Module) -> None:
    """As differentially private training has it."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (x[None],)).square().mean()

    gradients = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, X[0])
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].mean(0)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
