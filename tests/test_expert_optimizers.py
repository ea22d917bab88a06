"""AdamW and SGD on experts: torch's own on the same experts, without their N-fold gradients."""

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils._python_dispatch import TorchDispatchMode

import exfusion_param as exf
from exfusion_param.fusion.lookup import groups_of
from exfusion_param.tensors import functional, sliced_sums
from exfusion_testing.expert_optimizers import ADAMW, Make, assert_same, step, train, wrapped
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.ranks import on_threads
from exfusion_testing.sharded import mesh_of, my_part, whole_state
from exfusion_testing.strategies import configs, hidden_sizes, sizes

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*view tensor:UserWarning")


def experts_of(optimizer: torch.optim.Optimizer, model: Any) -> Tensor:
    experts: Tensor = optimizer.state[model.blocks[0].fc1.weight]["experts"]
    return experts


@pytest.fixture(params=[1, 40, 1 << 20])
def batch_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of one expert, of a few, and of many stacks."""
    monkeypatch.setitem(sliced_sums.SLICE, "cpu", request.param)


@given(
    config=configs(),
    dim=sizes,
    hidden=hidden_sizes,
    bias=st.booleans(),
    batch=st.integers(1, 200),
    fused=st.booleans(),
    maximize=st.booleans(),
    weight_decay=st.sampled_from([0.0, 0.3]),
)
def test_adamw_is_torchs(
    config: exf.ExFusionConfig,
    dim: int,
    hidden: int,
    bias: bool,
    batch: int,
    fused: bool,
    maximize: bool,
    weight_decay: float,
) -> None:
    torch.manual_seed(0)
    model = exf.wrap(FFNs(dim, hidden, bias=bias).double(), config, fuse_on="step")
    twin = copy.deepcopy(model)
    settings: dict[str, Any] = {"lr": 0.02, "fused": fused, "maximize": maximize}
    theirs = torch.optim.AdamW(exf.param_groups(twin, weight_decay), **settings)
    ours = exf.ExpertAdamW(exf.param_groups(model, weight_decay), **settings)
    train(twin, theirs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sliced_sums.SLICE, "cpu", batch)
        train(model, ours)
    assert_same(model, twin)


@pytest.mark.usefixtures("batch_size")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("variant", ["sw", "dw", "mb"])
def test_sgd_is_torchs(variant: str, momentum: float, nesterov: bool) -> None:
    settings: dict[str, Any] = {
        "lr": 0.1,
        "momentum": momentum,
        "nesterov": nesterov and momentum > 0,
    }
    model, twin = wrapped(variant=variant), wrapped(variant=variant)
    train(model, exf.ExpertSGD(exf.param_groups(model, 0.1), **settings))
    train(twin, torch.optim.SGD(exf.param_groups(twin, 0.1), **settings))
    assert_same(model, twin)


@pytest.mark.usefixtures("batch_size")
@pytest.mark.parametrize("state_dtype", [None, "8bit"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(
    tmp_path: Path, state_dtype: Any
) -> None:
    def make() -> tuple[Any, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = exf.wrap(FFNs(16, 32), seed=1, fuse_on="step", bank_init="uniform").double()
        return model, exf.ExpertAdamW(model.parameters(), **ADAMW, state_dtype=state_dtype)

    expected, optimizer = make()
    train(expected, optimizer, range(2))
    torch.save([expected.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    train(expected, optimizer, range(2, 4))
    model, optimizer = make()
    for restored, state in zip((model, optimizer), torch.load(tmp_path / "state.pt"), strict=True):
        restored.load_state_dict(state)
    train(model, optimizer, range(2, 4))
    assert_same(model, expected, rtol=0, atol=0)


class LargestTensor(TorchDispatchMode):
    """How many numbers the largest tensor has that is made in this context."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func._schema.returns[0].alias_info:
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("variant", ["sw", "dw", "mb"])
def test_a_step_makes_no_tensor_of_a_stacks_size(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped(variant=variant, num_experts=64)
    monkeypatch.setitem(sliced_sums.SLICE, "cpu", 100)
    optimizer = exf.ExpertAdamW(model.parameters())
    train(model, optimizer)  # which makes the states
    monkeypatch.setattr(functional, "EXACT_ROUTER_STATISTICS", 0)
    loss_of(model, inputs(5)).backward()
    with LargestTensor() as largest:
        optimizer.step()
    assert largest.numel < experts_of(optimizer, model).numel() / 4


def test_a_step_that_a_grad_scaler_skips_changes_nothing() -> None:
    model = wrapped().float()
    optimizer = exf.ExpertAdamW(model.parameters(), **ADAMW)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before: dict[str, Tensor] = {}
    for scale in (1.0, float("inf"), 1.0):
        before = copy.deepcopy(model.state_dict())
        scaler.scale(scale * loss_of(model, inputs(5).float())).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = not all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert moved == (scale == 1.0)
    assert optimizer.state[model.blocks[0].fc1.weight]["step"] == 2


MAKES: dict[str, Make] = {
    "AdamW": lambda params: torch.optim.AdamW(params, **ADAMW),
    "ExpertAdamW": lambda params: exf.ExpertAdamW(params, **ADAMW),
}


def fail(*args: object) -> None:
    raise InterruptedError


@pytest.mark.parametrize("name", MAKES)
def test_a_step_that_failed_can_be_tried_again_or_given_up(name: str) -> None:
    model, twin = wrapped(variant="dw"), wrapped(variant="dw")
    train(twin, MAKES[name](twin.parameters()), range(1))
    optimizer = MAKES[name](model.parameters())
    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(InterruptedError):
        train(model, optimizer, range(1))
    handle.remove()
    optimizer.step()
    assert_same(model, twin)

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(InterruptedError):
        train(model, optimizer, range(1))
    handle.remove()
    optimizer.zero_grad()
    optimizer.step()
    assert_same(model, twin)


def test_of_torchs_optimizers_one_stack_at_a_time_has_a_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = wrapped()
    fused = [fused for weights in groups_of(model) for fused in weights.fused]
    stacks: list[list[tuple[int, ...]]] = []
    module = importlib.import_module("torch.optim.adam")
    adam = module.adam

    def recording(params: Any, grads: Any, *args: Any, **kwargs: Any) -> None:
        shapes = [tuple(grad.shape) for grad in grads]
        stacks.append([shape for shape in shapes if shape[0] == 5 and len(shape) == 3])
        adam(params, grads, *args, **kwargs)

    monkeypatch.setattr(module, "adam", recording)
    train(model, torch.optim.AdamW(model.parameters()), range(1))
    assert sum(map(len, stacks)) == len([f for f in fused if f.name == "weight"])
    assert max(map(len, stacks)) == 1


class Outer(torch.optim.Optimizer):
    """Steps by another optimizer, as Lookahead does."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.inner.step()


@pytest.mark.parametrize("name", MAKES)
def test_an_optimizer_within_another_steps_once(name: str) -> None:
    model, twin = wrapped(), wrapped()
    train(twin, MAKES[name](twin.parameters()))
    inner = MAKES[name](model.parameters())
    train(model, Outer(inner))
    assert_same(model, twin)


def test_what_stacks_cannot_have_is_refused() -> None:
    model = wrapped()
    theirs = torch.optim.AdamW(model.parameters(), amsgrad=True)
    ours = exf.ExpertAdamW(model.parameters())
    with pytest.raises(ValueError, match="ExpertAdamW has no amsgrad=True for experts"):
        ours.load_state_dict(theirs.state_dict())
    ours.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="ExpertAdamW has no amsgrad=True for experts"):
        train(model, ours)


def test_a_closure_is_evaluated_once_and_its_gradient_is_applied() -> None:
    model, twin = wrapped(), wrapped()
    train(twin, exf.ExpertAdamW(twin.parameters(), **ADAMW), range(1))
    optimizer = exf.ExpertAdamW(model.parameters(), **ADAMW)

    def closure() -> Tensor:
        loss = loss_of(model, inputs(5))
        loss.backward()
        return loss

    assert optimizer.step(closure).ndim == 0
    optimizer.zero_grad()
    assert_same(model, twin)


def sharded(rank: int, dense: nn.Module, config: exf.ExFusionConfig, shape: Any) -> Any:
    model = exf.fully_shard(exf.wrap(copy.deepcopy(dense), config), mesh=mesh_of(*shape))
    optimizer = exf.ExpertAdamW(model.parameters(), **ADAMW)
    for seed in range(2):
        step(model, optimizer, my_part(rank, [inputs(5, batch=12, seed=seed)])[0])
    states = get_state_dict(model, optimizer)  # and a new optimizer goes on with them
    optimizer = exf.ExpertAdamW(model.parameters(), **ADAMW)
    set_state_dict(model, optimizer, model_state_dict=states[0], optim_state_dict=states[1])
    step(model, optimizer, my_part(rank, [inputs(5, batch=12, seed=2)])[0])
    return whole_state(model)


@pytest.mark.parametrize("variant", ["sw", "dw", "mb"])
@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (2, 2)])
def test_k_ranks_equal_one(variant: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    dense = FFNs(5, 7).double()  # uneven rows
    config = exf.ExFusionConfig(
        variant=variant, num_experts=3, seed=1, fuse_on="step", bank_init="uniform"
    )
    model = exf.wrap(copy.deepcopy(dense), config)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    for seed in range(3):
        step(model, optimizer, inputs(5, batch=12, seed=seed))
    for state in on_threads(torch.Size(shape).numel(), sharded, dense, config, shape):
        torch.testing.assert_close(state, dict(model.state_dict()), rtol=0, atol=1e-9)
