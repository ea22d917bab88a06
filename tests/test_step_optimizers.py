"""Under `fuse_on="step"`: optimizers from public repositories, several at once, resumed."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
import torch.distributed.checkpoint as dcp
from torch._dynamo.testing import CompileCounter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torchao.optim import AdamW8bit
from transformers.optimization import Adafactor as TransformersAdafactor

import exfusion_param as exf
from exfusion_testing.compilers import COMPILER
from exfusion_testing.step_models import (
    VARIANTS,
    Experts,
    Net,
    assert_equals_oracle,
    assert_same,
    batch,
    loss_of,
    train,
    wrap,
    wrapped,
)


class Stacked(torch.optim.Optimizer):
    """Momentum kept in one buffer for all matrices of a shape, as in copies of Muon."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            shapes: dict[Any, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for parameters in shapes.values():
                state, values = self.state[parameters[0]], torch.stack(parameters)
                gradients = torch.stack([parameter.grad for parameter in parameters])
                momentum = state.setdefault("momentum", torch.zeros_like(gradients))
                momentum.lerp_(gradients, 0.1)
                torch._foreach_copy_(parameters, list((values - 0.1 * momentum).unbind(0)))


class Alternating(torch.optim.Optimizer):
    """Momentum for every other parameter only, as a rank has it that owns half of them."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if index % 2:
                    state = self.state[parameter]
                    update = state.setdefault("momentum", torch.zeros_like(update))
                    update.lerp_(parameter.grad, 0.1)
                parameter.sub_(0.1 * update)


@pytest.mark.parametrize("make", [Stacked, Alternating])
def test_states_that_only_some_parameters_have_are_kept(make: Any) -> None:
    model = wrapped("sw")
    optimizer = make(model.parameters())
    train(model, optimizer, range(1))
    twin = copy.deepcopy((model, optimizer))
    for each, own in ((model, optimizer), twin):
        train(each, own, range(1, 4))
    assert_same(model.state_dict(), twin[0].state_dict(), 0)
    momenta = [s["experts.momentum"] for s in optimizer.state.values() if "experts.momentum" in s]
    assert momenta
    assert all(one is None or one.any() for each in momenta for one in each)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "make", [torch.optim.NAdam, torch.optim.ASGD, torch.optim.RAdam, torch.optim.Adagrad]
)
def test_what_all_experts_share_is_loaded_and_copied(variant: str, make: Any) -> None:
    model = wrapped(variant)
    optimizer = make(model.parameters(), lr=0.01)
    train(model, optimizer)
    resumed = wrapped(variant)
    resumed.load_state_dict(model.state_dict())
    again = make(resumed.parameters(), lr=0.01)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied = copy.deepcopy((model, optimizer))
    for each, own in ((model, optimizer), (resumed, again), copied):
        train(each, own, range(4, 7))
    assert_same(resumed.state_dict(), model.state_dict(), 1e-9)  # torch casts NAdam's product
    assert_same(copied[0].state_dict(), model.state_dict(), 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_grad_scaler_with_two_optimizers_changes_nothing(variant: str) -> None:
    states = []
    for enabled in (False, True):
        model = wrapped(variant)
        matrices = [p for p in model.parameters() if p.ndim > 1 and len(p) != 4]
        inside = set(map(id, matrices))
        rest = [p for p in model.parameters() if id(p) not in inside]
        optimizers = [torch.optim.SGD(held, lr=0.1, momentum=0.9) for held in (matrices, rest)]
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        for seed in range(3):
            scaler.scale(loss_of(model, batch(seed))).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            model.zero_grad()
        states.append(model.state_dict())
    assert_same(*states, 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gradient_that_is_written_past_autograd_counts(variant: str) -> None:
    models = [wrapped(variant), wrapped(variant)]
    for model, is_hidden in zip(models, (False, True), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in range(3):
            kept = {name: p.grad for name, p in model.named_parameters()}
            model.zero_grad()
            loss_of(model, batch(seed)).backward()
            for name, parameter in model.named_parameters():
                old = kept[name]
                if is_hidden and old is not None and parameter.grad is not None:
                    old.data.copy_(parameter.grad)  # leaves no trace in the version
                    parameter.grad = old
            optimizer.step()
    assert_same(models[0].state_dict(), models[1].state_dict(), 0)


def test_a_gradient_by_hand_moves_a_model_that_is_frozen() -> None:
    model = wrapped("sw").requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    before = model.blocks[0].fc1.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # each of 4 experts moves by a fourth of the rate
    expected = before - 0.1
    torch.testing.assert_close(model.blocks[0].fc1.weight, expected, rtol=0, atol=1e-12)


COMPILED: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
    "expert adamw": lambda p: exf.ExpertAdamW(p, lr=0.02, fused=False),
    "expert sgd": lambda p: exf.ExpertSGD(p, lr=0.02, momentum=0.9, state_dtype=torch.bfloat16),
    "stacked": Stacked,
}


@pytest.mark.compiled
@pytest.mark.parametrize("variant", ["sw", "mb"])
@pytest.mark.parametrize("make", COMPILED)
@pytest.mark.parametrize("is_whole", [False, True])
def test_a_compiled_step_equals_the_eager_one(variant: str, make: str, is_whole: bool) -> None:
    model, twin = wrapped(variant), wrapped(variant)
    ours, theirs = (COMPILED[make](each.parameters()) for each in (model, twin))

    def whole_step(x: torch.Tensor) -> None:
        loss_of(model, x).backward()
        ours.step()
        ours.zero_grad()

    torch.compiler.reset()
    step = torch.compile(whole_step if is_whole else ours.step, backend=COMPILER)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for seed in range(10):
            if is_whole:
                step(batch(seed))
            else:
                loss_of(model, batch(seed)).backward()
                step()
                ours.zero_grad()
            train(twin, theirs, [seed])
    assert_same(model.state_dict(), twin.state_dict(), 1e-12)


@pytest.mark.compiled
def test_what_follows_a_step_is_compiled_again() -> None:
    model = wrapped("sw")
    optimizer, counts = torch.optim.SGD(model.parameters(), lr=0.1), []
    counter = CompileCounter()

    @torch.compile(backend=counter)
    def step_and_loss(x: torch.Tensor) -> torch.Tensor:
        optimizer.step()
        return loss_of(model, x)

    for seed in range(3):
        loss_of(model, batch(seed)).backward()
        step_and_loss(batch(seed))
        counts.append(counter.frame_count)
    assert counts == [1, 1, 1]


def test_a_momentum_in_bfloat16_is_loaded() -> None:
    def make(model: Any) -> torch.optim.Optimizer:
        return timm.optim.AdafactorBigVision(model.parameters(), lr=0.01)

    model, resumed = wrapped("dw"), wrapped("dw")
    optimizer, again = train(model, make(model)), make(resumed)
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, own in ((model, optimizer), (resumed, again)):
        train(each, own, range(3, 6))
    assert_same(resumed.state_dict(), model.state_dict(), 0)
    assert again.state[resumed.blocks[0].fc1.weight]["experts.exp_avg"].dtype == torch.bfloat16


ADAFACTORS: dict[str, Any] = {
    "torch": lambda p: torch.optim.Adafactor(p, lr=0.02),
    "transformers": lambda p: TransformersAdafactor(p, lr=0.02, relative_step=False),
    "timm": lambda p: timm.optim.Adafactor(p, lr=0.02, min_dim_size_to_factor=4),
    "timm bv": lambda p: timm.optim.AdafactorBigVision(p, lr=0.02, min_dim_size_to_factor=4),
}


@pytest.mark.filterwarnings("ignore:The optimizer has trained .* as a dense weight")
@pytest.mark.parametrize("name", ADAFACTORS)
def test_each_expert_copies_the_factored_state_of_dense_training(name: str) -> None:
    model = Net()
    ours = train(model, ADAFACTORS[name](model.parameters()))
    oracle = Experts(wrap(model, "sw", expert_init="upcycle", upcycle_noise=0.1))
    theirs = ADAFACTORS[name](oracle.parameters())
    plain = {leaf: model.get_parameter(path) for path, leaf in oracle.plain().items()}
    experts = {e: model.get_parameter(path) for path, own in oracle.leaves.items() for e in own}
    for leaf, parameter in (plain | experts).items():
        theirs.state[leaf] = copy.deepcopy(ours.state[parameter])
    for seed in range(3, 8):
        for each, optimizer in ((model, ours), (oracle, theirs)):
            each.zero_grad()
            loss_of(each, batch(seed)).backward()
            optimizer.step()
    assert_equals_oracle(model, oracle)


def test_a_state_of_dense_training_that_cannot_be_copied_is_refused() -> None:
    torch.manual_seed(0)
    model = Net(dim=64, hidden=64)
    optimizer = train(model, AdamW8bit(model.parameters()))
    wrap(model, "sw", expert_init="upcycle")
    with pytest.raises(TypeError, match="OptimState8bit, which cannot be copied.*after wrap"):
        train(model, optimizer)
    model.zero_grad()
    train(model, AdamW8bit(model.parameters()))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*:FutureWarning")
@pytest.mark.parametrize("variant", VARIANTS)
def test_adagrad_loads_a_distributed_checkpoint_after_a_step_on_zeros(
    variant: str, tmp_path: Path
) -> None:
    model, resumed = wrapped(variant), wrapped(variant)
    optimizer = train(model, torch.optim.Adagrad(model.parameters(), lr=0.01))
    saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(saved, checkpoint_id=tmp_path)
    again = torch.optim.Adagrad(resumed.parameters(), lr=0.01)
    for parameter in resumed.parameters():
        parameter.grad = torch.zeros_like(parameter)
    again.step()
    again.zero_grad()
    states = get_state_dict(resumed, again)
    dcp.load(dict(zip(saved, states, strict=True)), checkpoint_id=tmp_path)
    set_state_dict(resumed, again, model_state_dict=states[0], optim_state_dict=states[1])
    for each, own in ((model, optimizer), (resumed, again)):
        train(each, own, range(3, 6))
    assert_same(resumed.state_dict(), model.state_dict(), 0)
