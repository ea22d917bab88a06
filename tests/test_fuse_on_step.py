"""`fuse_on="step"`: a dense model whose experts are updated at the optimizer's step."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import exfusion_param as exf
from exfusion_param.checkpoint import fuse_checkpoint, save_config
from exfusion_param.tensors import functional
from exfusion_testing.compilers import COMPILER
from exfusion_testing.experts import assert_trained_alike, fusion_weights
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.strategies import configs, hidden_sizes, sizes
from exfusion_testing.twins import plain, twins

EXACT = ["sw", "dw"]
VARIANTS = ["sw", "dw", "mb"]
Train = Callable[[nn.Module, torch.optim.Optimizer, Tensor], Any]


def in_a_closure(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        return loss

    optimizer.step(closure)


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    for part in x.chunk(2):
        (loss_of(model, part) / 2).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def with_a_forward_for_nothing(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor
) -> None:
    loss_of(model, 2 * x)
    loss_of(model, 3 * x).backward()
    model.zero_grad()
    plain(model, optimizer, x)


OPTIMIZERS: dict[str, Callable[[Iterable[Any]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.02, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "expert adamw": lambda p: exf.ExpertAdamW(p, lr=0.02, weight_decay=0.1),
    "expert sgd": lambda p: exf.ExpertSGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02, momentum=0.5),
}


LOOPS: list[Train] = [plain, in_a_closure, accumulated, with_a_forward_for_nothing]


@pytest.mark.parametrize("variant", EXACT)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_static_and_learned_weights_train_as_under_forward(
    variant: str, loop: Train, name: str
) -> None:
    trained = []
    for model in twins(variant):
        optimizer = OPTIMIZERS[name](model.parameters())
        for seed in range(4):
            loop(model, optimizer, inputs(seed=seed))
        trained.append((model, optimizer))
    assert_trained_alike(*trained)


@given(config=configs(variant="dw"), dim=sizes, hidden=hidden_sizes, bias=st.booleans())
def test_any_shape_trains_as_under_forward(
    config: exf.ExFusionConfig, dim: int, hidden: int, bias: bool
) -> None:
    trained = []
    for fuse_on in ("forward", "step"):
        torch.manual_seed(0)
        model = exf.wrap(FFNs(dim, hidden, bias=bias).double(), config, fuse_on=fuse_on)
        optimizer = torch.optim.AdamW(exf.param_groups(model, 0.1, fusion_lr=0.05), lr=0.02)
        for seed in range(3):
            plain(model, optimizer, inputs(dim, seed=seed))
        trained.append((model, optimizer))
    assert_trained_alike(*trained)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
def test_a_bank_moves_by_the_routers_mean_and_fuses_a_step_later(
    loop: Train, checkpointing: Any
) -> None:
    _, model = twins("mb", momentum=0.5)
    model.checkpointing = checkpointing
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(3):
        x = inputs(seed=seed)
        bank = fusion_weights(model)
        before = bank.bank.clone()
        weight = model.blocks[0].fc1.weight
        if optimizer.state:
            expected = functional.fuse(optimizer.state[weight]["experts"], before)
            assert torch.equal(weight, expected)
        with torch.no_grad():
            current = functional.route(model.stem(x), bank.router)
        loop(model, optimizer, x)
        torch.testing.assert_close(bank.bank, 0.5 * before + 0.5 * current, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings(
    "ignore:The router of .* has collapsed", "ignore:Expert . of .* is dead"
)
@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_the_routers_gradient_is_exact(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient(fuse_on: str) -> Tensor:
        forward, step = twins("mb", depth=1, momentum=0.9)
        stacks = [*fusion_weights(forward).expert_stacks()]
        model = step if fuse_on == "step" else forward
        bank = fusion_weights(model)
        with torch.no_grad():  # the current w is the bank, so that both fuse alike
            bank.router.mul_(scale)
            bank.bank.copy_(functional.route(model.stem(x), bank.router))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = bank.router.detach().clone()
        with torch.no_grad():
            for fused, stack in zip(bank.fused, stacks, strict=False):
                fused.parameter.copy_(functional.fuse(stack, bank.bank))
        loss_of(model, x).backward()
        optimizer.step()
        return before - bank.router.detach()

    x = inputs(batch=1, tokens=1)  # one token
    exact = gradient("forward")
    torch.testing.assert_close(gradient("step"), exact, rtol=1e-9, atol=1e-13)
    monkeypatch.setattr(functional, "EXACT_ROUTER_STATISTICS", 0)
    torch.testing.assert_close(gradient("step"), exact, rtol=1e-9, atol=1e-13)


@given(
    count=st.integers(2, 5),
    features=sizes,
    tokens=st.integers(1, 6),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_routers_statistics_give_autograds_gradient(
    count: int, features: int, tokens: int, masked: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = {"generator": generator, "dtype": torch.float64}
    x, gradient = torch.randn(3, tokens, features, **numbers), torch.randn(count, **numbers)
    router = (4 * torch.randn(count, features, **numbers)).requires_grad_()
    mask = torch.rand(3, tokens, generator=generator) < 0.7 if masked else None
    functional.route(x, router, mask).backward(gradient)
    statistics = functional.router_statistics(x, router.detach(), mask)
    ours = functional.router_gradient(statistics, gradient, features)
    torch.testing.assert_close(ours, router.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        statistics[:count], functional.route(x, router.detach(), mask), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_fuse_gives_the_trained_function_and_nothing_is_left(variant: str) -> None:
    _, model = twins(variant)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for seed in range(3):
        plain(model, optimizer, inputs(seed=seed))
    x, state = inputs(seed=9), exf.fused_state_dict(model)
    model.eval()
    before = model(x)
    exf.fuse(model)
    assert torch.equal(model(x), before)
    dense = FFNs().double()
    assert list(model.state_dict()) == list(dense.state_dict()) == list(state)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["adamw", "expert adamw", "sgd"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(name: str, variant: str) -> None:
    _, model = twins(variant)
    optimizer = OPTIMIZERS[name](model.parameters())
    for seed in range(2):
        plain(model, optimizer, inputs(seed=seed))
    _, resumed = twins(variant, seed=7)
    resumed.load_state_dict(model.state_dict())
    again = OPTIMIZERS[name](resumed.parameters())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, stepper in ((model, optimizer), (resumed, again)):
        plain(each, stepper, inputs(seed=5))
    assert_trained_alike((resumed, again), (model, optimizer), rtol=0, atol=0)


def test_two_optimizers_share_one_gradient_of_the_fusion_weights() -> None:
    trained = []
    for model in twins("dw"):
        fusion = [p for name, p in model.named_parameters() if "fusion_weights" in name]
        rest = [p for name, p in model.named_parameters() if "fusion_weights" not in name]
        optimizers = torch.optim.AdamW(rest, lr=0.02), torch.optim.SGD(fusion, lr=0.1)
        for seed in range(4):
            loss_of(model, inputs(seed=seed)).backward()
            for optimizer in optimizers[:: 1 if seed % 2 else -1]:
                optimizer.step()
            model.zero_grad()
        trained.append((model, optimizers[0]))
    assert_trained_alike(*trained)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_grad_scaler_skips_changes_nothing(fused: bool) -> None:
    forward, step = twins("dw")
    for model in (forward.float(), step.float()):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
        for seed in range(4):
            loss = loss_of(model, inputs(seed=seed).float())
            scaler.scale(loss * (float("inf") if seed == 1 else 1)).backward()
            before = copy.deepcopy(model.state_dict())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if seed == 1:
                assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    states = [dict(exf.fused_state_dict(model)) for model in (step, forward)]
    torch.testing.assert_close(*states, rtol=0, atol=1e-4)


@pytest.mark.compiled
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("checkpointing", [None, "non-reentrant"])
def test_compiled_equals_eager(variant: str, checkpointing: Any) -> None:
    torch.compiler.reset()
    _, eager = twins(variant)
    eager.checkpointing = checkpointing
    compiled = copy.deepcopy(eager)
    counter = CompileCounterWithBackend(COMPILER)
    compiled.compile(backend=counter, fullgraph=True)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (eager, compiled)]
    for seed in range(4):
        for model, optimizer in zip((eager, compiled), optimizers, strict=True):
            accumulated(model, optimizer, inputs(seed=seed))
        pairs = zip((compiled, eager), optimizers[::-1], strict=True)
        assert_trained_alike(*pairs)
        assert counter.frame_count == 1
    torch.compiler.reset()


@pytest.mark.parametrize("variant", VARIANTS)
def test_averages_are_of_the_fused_weights(variant: str) -> None:
    _, model = twins(variant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ModelEmaV3(model, decay=0.5)
    swa = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    weight = model.blocks[0].fc1.weight
    by_hand = weight.detach().clone()
    for seed in range(3):
        plain(model, optimizer, inputs(seed=seed))
        ema.update(model)
        swa.update_parameters(model)
        by_hand = 0.5 * by_hand + 0.5 * weight.detach()
    assert torch.allclose(ema.module.blocks[0].fc1.weight, by_hand, rtol=0, atol=1e-12)
    for average in (ema.module, swa.module):
        x, shipped = inputs(seed=9), exf.fuse(copy.deepcopy(average)).eval()
        assert torch.equal(average.eval()(x), shipped(x))


def test_a_summary_counts_the_experts_that_an_optimizer_will_hold() -> None:
    forward, step = map(exf.summarize, twins("mb"))
    assert step.training_parameters == forward.training_parameters
    assert step.shipped_parameters == forward.shipped_parameters
    ffns = 2 * (6 * 4 + 6 + 4 * 6 + 4)  # parameters of two dense FFNs in float64
    weights_and_gradients, gradients_of_stacks = 2 * 8 * ffns, 4 * 8 * ffns
    expected = forward.training_bytes + weights_and_gradients - gradients_of_stacks
    assert step.training_bytes == expected
    assert step == exf.summarize(FFNs().double(), seed=0, bank_init="uniform", fuse_on="step")


def test_a_checkpoint_fuses_on_disk(tmp_path: Path) -> None:
    _, model = twins("mb")
    plain(model, torch.optim.SGD(model.parameters(), lr=0.1), inputs())
    save_config(model, tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    dense = load_file(fuse_checkpoint(tmp_path, tmp_path / "dense.safetensors"))
    for name, value in exf.fuse(model).state_dict().items():
        assert torch.equal(dense[name], value)
