"""`fuse_on="step"`: dense forward and backward on a leaf, experts at the optimizer's step."""

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
from exfusion_param import functional
from exfusion_param.checkpoint import fuse_checkpoint, save_config
from exfusion_testing.compilers import COMPILER
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.strategies import configs, sizes

EXACT = ["sw", "dw"]
VARIANTS = ["sw", "dw", "mb"]
Train = Callable[[nn.Module, torch.optim.Optimizer, Tensor], Any]


def twins(variant: str, depth: int = 2, **kwargs: Any) -> tuple[FFNs, FFNs]:
    """The same model, fused at each forward and at each step."""
    fields = {"variant": variant, "seed": 0, "bank_init": "uniform"} | kwargs
    torch.manual_seed(0)
    dense = FFNs(depth=depth).double()
    return (
        exf.wrap(copy.deepcopy(dense), fuse_on="forward", **fields),
        exf.wrap(copy.deepcopy(dense), fuse_on="step", **fields),
    )


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    loss_of(model, x).backward()
    optimizer.step()
    optimizer.zero_grad()


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
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.02),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, line_search_fn="strong_wolfe"),
}


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-9, msg=name)


LOOPS: list[Train] = [plain, in_a_closure, accumulated, with_a_forward_for_nothing]


@pytest.mark.parametrize("variant", EXACT)
@pytest.mark.parametrize(
    ("name", "loop"),
    [
        (name, loop)
        for name in OPTIMIZERS
        for loop in LOOPS
        if name != "lbfgs" or loop is in_a_closure  # which LBFGS needs
    ],
)
def test_static_and_learned_weights_train_as_under_forward(
    variant: str, loop: Train, name: str
) -> None:
    forward, step = twins(variant)
    for model in (forward, step):
        optimizer = OPTIMIZERS[name](model.parameters())
        for seed in range(4):
            loop(model, optimizer, inputs(seed=seed))
    assert_same_state(step, forward)


@given(config=configs(variant="dw"), dim=sizes, hidden=sizes, bias=st.booleans())
def test_any_shape_trains_as_under_forward(
    config: exf.ExFusionConfig, dim: int, hidden: int, bias: bool
) -> None:
    states = []
    for fuse_on in ("forward", "step"):
        torch.manual_seed(0)
        model = exf.wrap(FFNs(dim, hidden, bias=bias).double(), config, fuse_on=fuse_on)
        optimizer = torch.optim.AdamW(exf.param_groups(model, 0.1, fusion_lr=0.05), lr=0.02)
        for seed in range(3):
            plain(model, optimizer, inputs(dim, seed=seed))
        states.append(model)
    assert_same_state(*states)


def bank_of(model: nn.Module, block: int = 0) -> Any:
    return model.blocks[block].fc1.parametrizations.weight[0].fusion_weights


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
        bank = bank_of(model)
        before = bank.bank.clone()
        linear = model.blocks[0].fc1
        expected = functional.fuse(linear.parametrizations.weight.original, before)
        assert torch.equal(linear.weight, expected)
        with torch.no_grad():
            current = functional.route(model.stem(x), bank.router)
        loop(model, optimizer, x)
        torch.testing.assert_close(bank.bank, 0.5 * before + 0.5 * current, rtol=0, atol=1e-12)


def test_the_routers_gradient_is_the_exact_one_where_all_tokens_are_routed_alike() -> None:
    forward, step = twins("mb", depth=1, momentum=0.9)
    x = inputs(batch=1, tokens=1)  # one token
    for model in (forward, step):
        with torch.no_grad():  # the current w is the bank, so that both fuse alike
            bank_of(model).bank.copy_(functional.route(model.stem(x), bank_of(model).router))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loss_of(model, x).backward()
        optimizer.step()
    torch.testing.assert_close(
        bank_of(step).router.grad, bank_of(forward).router.grad, rtol=1e-9, atol=1e-15
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
def test_checkpoints_of_one_mode_load_in_the_other_and_resume_bitwise(variant: str) -> None:
    forward, step = twins(variant)
    optimizer = torch.optim.AdamW(step.parameters(), lr=0.02)
    for seed in range(2):
        plain(step, optimizer, inputs(seed=seed))
    assert step.state_dict().keys() == forward.state_dict().keys()
    forward.load_state_dict(step.state_dict())
    assert torch.equal(forward.eval()(inputs()), step.eval()(inputs()))
    _, resumed = twins(variant)
    resumed.load_state_dict(step.state_dict())
    again = torch.optim.AdamW(resumed.parameters(), lr=0.02)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, stepper in ((step.train(), optimizer), (resumed, again)):
        plain(model, stepper, inputs(seed=5))
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, step.state_dict()[name])


CHANGES: dict[str, Callable[[FFNs], Any]] = {
    "copy_": lambda model: model.blocks[0].fc1.parametrizations.weight.original.copy_(
        torch.ones(4, 6, 4)
    ),
    "assignment": lambda model: setattr(model.blocks[0].fc1, "weight", torch.ones(6, 4).double()),
    "load_state_dict": lambda model: model.load_state_dict(
        {name: value + 1 for name, value in model.state_dict().items()}
    ),
    "assign": lambda model: model.load_state_dict(
        {name: value + 1 for name, value in model.state_dict().items()}, assign=True
    ),
    "reset_parameters": lambda model: model.blocks[0].fc1.reset_parameters(),
    "the leaf": lambda model: model.blocks[0].fc1.parametrizations.weight[0].fused.zero_(),
    "float": lambda model: model.float(),
    "data and eval": lambda model: (
        model.blocks[0].fc1.parametrizations.weight.original.data.zero_(),
        model.eval(),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("change", CHANGES)
def test_leaf_and_stack_agree_whatever_changed_one_of_them(variant: str, change: str) -> None:
    _, model = twins(variant)
    with torch.no_grad():
        CHANGES[change](model)
        dense = copy.deepcopy(model)
        shipped = exf.fused_state_dict(model)
        x = inputs().to(model.stem.weight.dtype)
        assert torch.equal(model.eval()(x), exf.fuse(dense).eval()(x))
    for name, value in exf.fuse(model).state_dict().items():
        assert torch.equal(value, shipped[name])


def test_a_leaf_that_an_optimizer_holds_without_its_stack_stays_in_place() -> None:
    _, model = twins("sw")
    leaf = model.blocks[0].fc1.parametrizations.weight[0].fused
    stack = model.blocks[0].fc1.parametrizations.weight.original
    start = leaf.detach().clone()
    others = [p for p in model.parameters() if p is not stack]
    optimizer = torch.optim.SGD(others, lr=0.1)
    plain(model, optimizer, inputs())
    assert torch.equal(leaf, start)


def test_two_optimizers_pull_back_once() -> None:
    forward, step = twins("dw")
    for model in (forward, step):
        fusion = [p for name, p in model.named_parameters() if "fusion_weights" in name]
        rest = [p for name, p in model.named_parameters() if "fusion_weights" not in name]
        optimizers = torch.optim.AdamW(rest, lr=0.02), torch.optim.SGD(fusion, lr=0.1)
        for seed in range(4):
            loss_of(model, inputs(seed=seed)).backward()
            for optimizer in optimizers[:: 1 if seed % 2 else -1]:
                optimizer.step()
            model.zero_grad()
    assert_same_state(step, forward)


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
    for name, value in step.state_dict().items():
        torch.testing.assert_close(value, forward.state_dict()[name], rtol=0, atol=1e-4)


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
        assert_same_state(compiled, eager)
        assert counter.frame_count == 1
    torch.compiler.reset()


@pytest.mark.compiled
def test_a_change_that_a_compiled_forward_cannot_see_is_an_error_with_the_way_out() -> None:
    torch.compiler.reset()
    _, model = twins("sw")
    model.compile(fullgraph=True, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stack = model.blocks[0].fc1.parametrizations.weight.original
    plain(model, optimizer, inputs())
    with torch.no_grad():
        stack.mul_(2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="'blocks.0' were changed in place, and the compiled"):
        plain(model, optimizer, inputs())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.zero_grad()
    model.train()
    plain(model, optimizer, inputs())
    torch.compiler.reset()


@pytest.mark.parametrize("variant", VARIANTS)
def test_averages_of_the_weights_are_fused_from_averaged_stacks(variant: str) -> None:
    forward, step = twins(variant)
    averages = []
    for model in (forward, step):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ema = ModelEmaV3(model, decay=0.5)
        swa = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        for seed in range(3):
            plain(model, optimizer, inputs(seed=seed))
            ema.update(model)
            swa.update_parameters(model)
        for average in (ema.module, swa.module):
            x, shipped = inputs(seed=9), exf.fuse(copy.deepcopy(average)).eval()
            assert torch.equal(average.eval()(x), shipped(x))
        averages.append(ema.module)
    if variant in EXACT:
        assert_same_state(*averages)


def test_a_summary_counts_the_leaf_as_memory_alone() -> None:
    forward, step = map(exf.summarize, twins("mb"))
    assert step.training_parameters == forward.training_parameters
    assert step.shipped_parameters == forward.shipped_parameters
    ffns = 2 * (6 * 4 + 6 + 4 * 6 + 4)  # parameters of two dense FFNs in float64
    leaves, gradients_of_stacks = 2 * 8 * ffns, 4 * 8 * ffns
    assert step.training_bytes == forward.training_bytes + leaves - gradients_of_stacks
    assert step == exf.summarize(FFNs().double(), seed=0, bank_init="uniform", fuse_on="step")


def test_a_checkpoint_fuses_on_disk(tmp_path: Path) -> None:
    _, model = twins("mb")
    plain(model, torch.optim.SGD(model.parameters(), lr=0.1), inputs())
    save_config(model, tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    dense = load_file(fuse_checkpoint(tmp_path, tmp_path / "dense.safetensors"))
    for name, value in exf.fuse(model).state_dict().items():
        assert torch.equal(dense[name], value)
