"""`displacement="shared"`: frozen starting values, and one displacement for all experts."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import exfusion_param as exf
from exfusion_param.checkpoint import fuse_checkpoint, save_config
from exfusion_param.parametrization import fused_names, fusion_of, original, wrapped_linears
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.ranks import on_ranks, on_threads
from exfusion_testing.sharded import mesh_of, my_part, whole_state
from exfusion_testing.strategies import configs, sizes

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*view tensor:UserWarning")

ADAMW = {"lr": 0.02, "weight_decay": 0.1}


class Sign(torch.optim.Optimizer):
    """Sign descent with decoupled weight decay, which moves experts of equal sign alike."""

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "decoupled_weight_decay": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])


def wrapped(config: exf.ExFusionConfig | None = None, shared: bool = True, **fields: Any) -> Any:
    torch.manual_seed(0)
    fields = {"num_experts": 5, "bank_init": "uniform", "seed": 1} | fields
    config = config or exf.ExFusionConfig(**fields)  # type: ignore[arg-type]
    displacement = "shared" if shared else "own"
    return exf.wrap(FFNs(5, 7).double(), config, fuse_on="step", displacement=displacement)


def with_own_displacements(model: nn.Module, config: exf.ExFusionConfig) -> nn.Module:
    """The same experts, each of which moves by itself."""
    twin = exf.wrap(exf.fuse(copy.deepcopy(model)), config, displacement="own")
    state = {name: value for name, value in model.state_dict().items() if ".0.d" not in name}
    for fqn, linear in wrapped_linears(model).items():
        for name in fused_names(linear):
            experts = fusion_of(linear, name).experts(original(linear, name))
            state[f"{fqn}.parametrizations.{name}.original"] = experts
    twin.load_state_dict(state)
    return twin


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    loss_of(model, x).backward()
    optimizer.step()
    optimizer.zero_grad()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range = range(3)) -> None:
    for seed in seeds:
        step(model, optimizer, inputs(model.stem.in_features, seed=seed))


def assert_same_function(ours: nn.Module, theirs: nn.Module) -> None:
    pairs = [exf.fused_state_dict(model) for model in (ours, theirs)]
    torch.testing.assert_close(*map(dict, pairs), rtol=0, atol=1e-10)


@given(configs(bank_init="uniform"), sizes, sizes, st.booleans())
def test_experts_that_get_equal_updates_need_one_displacement(
    config: exf.ExFusionConfig, dim: int, hidden: int, bias: bool
) -> None:
    config = config.replace(fuse_on="step", displacement="shared")
    torch.manual_seed(0)
    model = exf.wrap(FFNs(dim, hidden, bias=bias).double(), config)
    twin = with_own_displacements(model, config)
    for each in (model, twin):
        fusion = [p for p in each.parameters() if p.requires_grad]
        train(each, Sign(fusion, lr=1e-3, weight_decay=0.5))
    assert_same_function(model, twin)


@given(st.integers(2, 8), st.sampled_from([0.0, 0.5]))
def test_under_static_weights_adamw_needs_one_displacement(n: int, weight_decay: float) -> None:
    config = exf.ExFusionConfig(
        variant="sw", num_experts=n, seed=1, fuse_on="step", displacement="shared"
    )
    model = wrapped(config)
    twin = with_own_displacements(model, config)
    # The experts of a stack have 1/N of the gradient, and so the larger eps; others are frozen.
    for each, eps in ((model, n * 1e-6), (twin, 1e-6)):
        each.requires_grad_(False)
        for linear in wrapped_linears(each).values():
            fusion_of(linear, "weight").moved(original(linear, "weight")).requires_grad_(True)
        each.train()  # the leaves follow
        trained = [p for p in each.parameters() if p.requires_grad]
        train(each, torch.optim.AdamW(trained, 0.02, eps=eps, weight_decay=weight_decay))
    assert_same_function(model, twin)


@pytest.mark.parametrize("variant", ["sw", "dw", "mb"])
@pytest.mark.parametrize("expert_init", ["independent", "upcycle", "drop_upcycle"])
def test_it_starts_where_experts_with_displacements_of_their_own_do(
    variant: str, expert_init: str
) -> None:
    model, twin = (
        wrapped(None, shared, variant=variant, expert_init=expert_init) for shared in (True, False)
    )
    assert original(model.blocks[0].fc1, "weight").dtype == torch.bfloat16
    assert_same_function(model, twin)


def test_the_optimizer_holds_no_state_of_a_stacks_size() -> None:
    model = wrapped(num_experts=64)
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.1))
    train(model, optimizer)
    dense = sum(p.numel() for p in exf.fuse(copy.deepcopy(model)).parameters())
    routers = exf.summarize(model).fusion_parameters
    states = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    assert sum(value.numel() for value in states) == 2 * (dense + routers)
    assert exf.summarize(model).shipped_parameters == dense


def test_fuse_gives_the_dense_model_back() -> None:
    model = wrapped()
    train(model, torch.optim.AdamW(model.parameters(), **ADAMW))
    expected, y = exf.fused_state_dict(model), model.eval()(inputs(5))
    shipped = exf.fuse(copy.deepcopy(model))
    torch.testing.assert_close(shipped.state_dict(), expected, rtol=0, atol=0)
    assert list(shipped.state_dict()) == list(FFNs(5, 7).state_dict())
    assert all(p.requires_grad and p.dtype == torch.float64 for p in shipped.parameters())
    torch.testing.assert_close(shipped(inputs(5)), y, rtol=0, atol=0)
    train(model.train(), torch.optim.AdamW(model.parameters(), **ADAMW))  # the original trains on


def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit() -> None:
    expected = wrapped()
    optimizer = torch.optim.AdamW(expected.parameters(), **ADAMW)
    train(expected, optimizer, range(2))
    state = copy.deepcopy([expected.state_dict(), optimizer.state_dict()])
    train(expected, optimizer, range(2, 4))
    model = wrapped(seed=2)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    train(model, optimizer, range(2, 4))
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_a_checkpoint_on_disk_fuses_without_the_model(tmp_path: Path) -> None:
    model = wrapped().float()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    for seed in range(3):
        step(model, optimizer, inputs(5, seed=seed).float())
    (tmp_path / "run").mkdir()
    save_config(model, tmp_path / "run")
    save_file(model.state_dict(), tmp_path / "run" / "model.safetensors")
    dense = load_file(fuse_checkpoint(tmp_path / "run", tmp_path / "dense.safetensors"))
    expected = dict(exf.fused_state_dict(model))
    torch.testing.assert_close(dense, expected, rtol=0, atol=1e-7)


def test_dense_weights_come_in_whole() -> None:
    model = wrapped()
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.1), lr=0.02)
    train(model, optimizer)
    dense = FFNs(5, 7).double().state_dict()
    exf.load_dense_state_dict(model, dense)
    torch.testing.assert_close(dict(exf.fused_state_dict(model)), dict(dense), rtol=0, atol=1e-12)
    weight = torch.randn(7, 5, dtype=torch.float64)
    model.blocks[0].fc1.weight = weight
    torch.testing.assert_close(model.blocks[0].fc1.weight.detach(), weight, rtol=0, atol=1e-12)
    train(model, optimizer)
    model.blocks[0].fc1.reset_parameters()
    fusion = fusion_of(model.blocks[0].fc1, "weight")
    assert fusion.decay == 1  # type: ignore[comparison-overlap]
    assert model.blocks[0].fc1.weight.std() > 0


def test_thawing_all_parameters_does_not_move_the_starts() -> None:
    model, twin = wrapped(), wrapped()
    starts = copy.deepcopy(original(model.blocks[0].fc1, "weight"))
    model.requires_grad_(True)
    for each in (model, twin):
        train(each, torch.optim.AdamW(each.parameters(), **ADAMW))
    assert torch.equal(original(model.blocks[0].fc1, "weight"), starts)
    assert_same_function(model, twin)


def test_a_cast_model_takes_weights() -> None:
    model = wrapped().float()
    model.blocks[0].fc1.weight = torch.ones(7, 5)
    torch.testing.assert_close(model.blocks[0].fc1.weight.detach(), torch.ones(7, 5))


def test_an_average_is_that_of_the_fused_weights() -> None:
    model = wrapped(variant="sw")
    average = AveragedModel(model)
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.5), lr=0.1)
    seen = []
    for seed in range(3):
        step(model, optimizer, inputs(5, seed=seed))
        average.update_parameters(model)
        seen.append(model.blocks[0].fc1.weight.detach().clone())
    expected = torch.stack(seen).mean(dim=0)
    fused = exf.fused_state_dict(average.module.eval())["blocks.0.fc1.weight"]
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-12)


def test_the_decay_keeps_its_precision_in_bfloat16() -> None:
    model = wrapped().bfloat16()
    assert fusion_of(model.blocks[0].fc1, "weight").decay.dtype == torch.float64


def test_a_step_that_a_grad_scaler_skips_decays_nothing() -> None:
    model = wrapped().float()
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.1), lr=0.02, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    fusion = fusion_of(model.blocks[0].fc1, "weight")
    for scale, expected in ((1.0, 0.998), (float("inf"), 0.998), (1.0, 0.998**2)):
        scaler.scale(scale * loss_of(model, inputs(5).float())).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert fusion.decay.item() == pytest.approx(expected)  # type: ignore[operator]


def test_experts_without_a_gradient_do_not_decay() -> None:
    model = wrapped()
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.1), lr=0.02)
    model.blocks[0](torch.randn(2, 3, 5, dtype=torch.float64)).sum().backward()
    optimizer.step()
    first, second = (fusion_of(block.fc1, "weight") for block in model.blocks)
    assert first.decay < 1  # type: ignore[operator]
    assert second.decay == 1  # type: ignore[comparison-overlap]


def fsdp2(rank: int, model: nn.Module, shape: tuple[int, ...]) -> Any:
    model = exf.fully_shard(copy.deepcopy(model), mesh=mesh_of(*shape))
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.1), lr=0.02)
    for seed in range(3):
        step(model, optimizer, my_part(rank, [inputs(5, batch=12, seed=seed)])[0])
    fused = {name: tensor.full_tensor() for name, tensor in exf.fused_state_dict(model).items()}
    return whole_state(model), fused, exf.metrics(model)


@pytest.mark.parametrize("variant", ["sw", "dw", "mb"])
@pytest.mark.parametrize("shape", [(3,), (4,), (2, 2)])
def test_k_ranks_equal_one(variant: Any, shape: tuple[int, ...]) -> None:
    expected = wrapped(variant=variant)
    model = copy.deepcopy(expected)
    optimizer = torch.optim.AdamW(exf.param_groups(expected, 0.1), lr=0.02)
    for seed in range(3):
        step(expected, optimizer, inputs(5, batch=12, seed=seed))
    results = on_threads(torch.Size(shape).numel(), fsdp2, model, shape)
    for state, fused, metrics in results:
        torch.testing.assert_close(state, dict(expected.state_dict()), rtol=0, atol=1e-9)
        dense = dict(exf.fused_state_dict(expected))
        torch.testing.assert_close(fused, dense, rtol=0, atol=1e-9)
        assert metrics == pytest.approx(exf.metrics(expected), rel=1e-5)


def ddp(rank: int) -> dict[str, Tensor]:
    model = wrapped()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.1), lr=0.02)
    for seed in range(3):
        step(parallel, optimizer, my_part(rank, [inputs(5, batch=12, seed=seed)])[0])
    return dict(model.state_dict())


@pytest.mark.processes
def test_two_ddp_ranks_equal_one() -> None:
    model = wrapped()
    states = on_ranks(2, ddp)
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.1), lr=0.02)
    for seed in range(3):
        step(model, optimizer, inputs(5, batch=12, seed=seed))
    for state in states:
        torch.testing.assert_close(state, dict(model.state_dict()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shared", [False, True])
def test_states_of_the_other_displacement_are_refused(shared: bool) -> None:
    model, other = wrapped(shared=shared), wrapped(shared=not shared)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="was saved with displacement="):
        model.load_state_dict(other.state_dict(), strict=False)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_it_needs_the_optimizer_side_way() -> None:
    with pytest.raises(ValueError, match='displacement="shared" needs fuse_on="step"'):
        exf.ExFusionConfig(displacement="shared")


def test_weight_decay_has_to_be_decoupled() -> None:
    model = wrapped()
    loss_of(model, inputs(5)).backward()
    optimizer = torch.optim.SGD(exf.param_groups(model, 0.1), lr=0.1)
    with pytest.raises(RuntimeError, match="SGD is not known to decouple weight decay"):
        optimizer.step()
    train(model, torch.optim.SGD(exf.param_groups(model, 0.0), lr=0.1))
