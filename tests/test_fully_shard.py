"""What a sharded model does in a training script: FSDP2's switches, and what is around them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard

import exfusion_param as exf
from exfusion_testing.compilers import COMPILER
from exfusion_testing.models import FFNs, loss_of
from exfusion_testing.ranks import on_ranks, on_threads
from exfusion_testing.sharded import (
    BATCHES,
    EXACT,
    assert_same,
    dense_model,
    mesh_of,
    my_part,
    settings_of,
    train,
    whole_state,
)

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*view tensor:UserWarning")
Loop = Callable[[nn.Module, list[Tensor]], object]


def without_syncing_micro_batches(model: Any, batches: list[Tensor]) -> None:
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.1), lr=0.02)
    for batch in batches:
        for index, part in enumerate(batch.chunk(2)):
            if isinstance(model, torch.distributed.fsdp.FSDPModule):
                model.set_requires_gradient_sync(index == 1)
            (loss_of(model, part) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()


def with_sgd_on_model_parameters(model: nn.Module, batches: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
    for batch in batches:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def with_steps_that_grad_scaler_skips(model: nn.Module, batches: list[Tensor]) -> None:
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.1), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
    for index, batch in enumerate(batches):
        overflow = float("inf") if index in (0, 2) else 1.0
        scaler.scale(loss_of(model, batch) * overflow).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def with_eval_between(model: nn.Module, batches: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            model(batch)
        model.train()


def checkpointed(kind: Any) -> Loop:
    def loop(model: nn.Module, batches: list[Tensor]) -> None:
        model.checkpointing = kind
        train(model, batches)

    return loop


def moved(model: nn.Module, batches: list[Tensor]) -> None:
    train(model.to("cpu"), batches)  # as trainers do, whatever the model is


def sharded(rank: int, dense: nn.Module, config: exf.ExFusionConfig, loop: Loop) -> Any:
    model = exf.wrap(copy.deepcopy(dense), config)
    exf.fully_shard(model, mesh=mesh_of(2))
    loop(model, my_part(rank, BATCHES, 2))
    return whole_state(model)


@pytest.mark.parametrize("fuse_on", ["step", "forward"])
@pytest.mark.parametrize("variant", ["dw", "mb"])
@pytest.mark.parametrize(
    "loop",
    [
        train,
        without_syncing_micro_batches,
        with_sgd_on_model_parameters,
        with_steps_that_grad_scaler_skips,
        with_eval_between,
        checkpointed("reentrant"),
        checkpointed("non-reentrant"),
        moved,
    ],
)
def test_each_kind_of_loop_equals_one_rank(fuse_on: str, variant: str, loop: Loop) -> None:
    dense, config = dense_model(), settings_of(fuse_on, variant)
    one = exf.wrap(copy.deepcopy(dense), config)
    loop(one, BATCHES)
    assert_same(on_threads(2, sharded, dense, config, loop), one.state_dict())


def with_an_empty_rank(rank: int, dense: nn.Module, config: exf.ExFusionConfig) -> Any:
    model = exf.fully_shard(exf.wrap(copy.deepcopy(dense), config), mesh=mesh_of(2))
    train_on_sums(model, [batch if rank == 0 else batch[:0] for batch in BATCHES], ranks=2)
    return whole_state(model)


def train_on_sums(model: nn.Module, batches: list[Tensor], ranks: int) -> None:
    """A loss that is a sum over samples, by which a rank without any has none."""
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.1), lr=0.02)
    for batch in batches:
        y = model(batch)
        ((y.square() + y.sin()).sum() * ranks / 96).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("fuse_on", ["step", "forward"])
@pytest.mark.parametrize("variant", ["dw", "mb"])
def test_a_rank_without_data_at_a_step_has_no_vote(fuse_on: str, variant: str) -> None:
    dense, config = dense_model(), settings_of(fuse_on, variant)
    one = exf.wrap(copy.deepcopy(dense), config)
    train_on_sums(one, BATCHES, ranks=1)
    assert_same(on_threads(2, with_an_empty_rank, dense, config), one.state_dict())


def in_bfloat16(rank: int, dense: nn.Module, config: exf.ExFusionConfig | None) -> Any:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = copy.deepcopy(dense).float()
    if config is None:
        torch_fully_shard(model, mesh=mesh_of(2), mp_policy=policy)
    else:
        exf.fully_shard(exf.wrap(model, config), mesh=mesh_of(2), mp_policy=policy)
    outputs = [model(batch.float()) for batch in my_part(rank, BATCHES)]
    if config is not None:
        train(model, [batch.float() for batch in my_part(rank, BATCHES)])
        assert all(t.dtype == torch.float32 for t in model.state_dict().values())
    return torch.cat(outputs).detach().double()


@pytest.mark.parametrize("fuse_on", ["step", "forward"])
@pytest.mark.parametrize("variant", ["sw", "dw", "mb"])
def test_mixed_precision_errs_like_the_dense_model(fuse_on: str, variant: str) -> None:
    dense, config = dense_model(), settings_of(fuse_on, variant)
    fused = exf.fuse(exf.wrap(copy.deepcopy(dense), config, fuse_on="step"))
    exact = fused(BATCHES[0][:4]).detach()
    ours = on_threads(2, in_bfloat16, dense, config)[0][:4]
    theirs = on_threads(2, in_bfloat16, fused, None)[0][:4]
    error, allowed = (ours - exact).norm(), 1.5 * (theirs - exact).norm()
    assert 0 < error < allowed


def offloaded(rank: int, dense: nn.Module, config: exf.ExFusionConfig, policy: Any) -> Any:
    model = exf.wrap(copy.deepcopy(dense), config)
    exf.fully_shard(model, mesh=mesh_of(2), offload_policy=policy, reshard_after_forward=False)
    return whole_state(train(model, my_part(rank, BATCHES)))


@pytest.mark.parametrize("fuse_on", ["step", "forward"])
@pytest.mark.parametrize("policy", [OffloadPolicy(), CPUOffloadPolicy(pin_memory=False)])
def test_offload_and_resharding_are_fsdp2s(fuse_on: str, policy: Any) -> None:
    dense, config = dense_model(), settings_of(fuse_on)
    one = train(exf.wrap(copy.deepcopy(dense), config), BATCHES).state_dict()
    assert_same(on_threads(2, offloaded, dense, config, policy), one)


def compiled(rank: int, dense: nn.Module, configs: list[Any], orders: list[str]) -> Any:
    return [compile_and_train(rank, dense, config, order) for config in configs for order in orders]


def compile_and_train(rank: int, dense: nn.Module, config: Any, order: str) -> dict[str, Tensor]:
    torch.compiler.reset()
    model: Any = exf.wrap(copy.deepcopy(dense), config)
    if order == "blocks, then shard":
        for block in model.blocks:
            block.compile(fullgraph=True, backend=COMPILER)
    exf.fully_shard(model, mesh=mesh_of(2))
    if order == "shard, then blocks":
        for block in model.blocks:
            block.compile(fullgraph=True, backend=COMPILER)
    run = torch.compile(model, backend=COMPILER) if order == "whole" else model
    train(run, my_part(rank, BATCHES))
    return whole_state(model)


@pytest.mark.compiled
@pytest.mark.processes
def test_compiled_processes_equal_one_eager_rank() -> None:
    dense, orders = dense_model(), ["shard, then blocks", "blocks, then shard", "whole"]
    configs = [settings_of("step"), settings_of("forward")]
    results = on_ranks(2, compiled, dense, configs, orders)
    for index, config in enumerate(configs):
        one = train(exf.wrap(copy.deepcopy(dense), config), BATCHES).state_dict()
        for states in results:
            assert_same(states[len(orders) * index : len(orders) * (index + 1)], one)


def metrics_of(rank: int, dense: nn.Module, config: Any, shape: tuple[int, ...]) -> Any:
    model = exf.wrap(copy.deepcopy(dense), config)
    return exf.metrics(exf.fully_shard(model, mesh=mesh_of(*shape)))


@pytest.mark.parametrize("fuse_on", ["step", "forward"])
@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_metrics_are_those_of_the_whole_model(fuse_on: str, shape: tuple[int, ...]) -> None:
    dense, config = dense_model(), settings_of(fuse_on)
    expected = exf.metrics(exf.wrap(copy.deepcopy(dense), config))
    for values in on_threads(torch.Size(shape).numel(), metrics_of, dense, config, shape):
        assert values == pytest.approx(expected, rel=1e-6)


def from_meta(rank: int, config: Any, dense_state: dict[str, Tensor]) -> Any:
    with torch.device("meta"):
        model = FFNs().double()
    exf.fully_shard(exf.wrap(model, config), mesh=mesh_of(2))
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    generator = torch.Generator().manual_seed(5)
    exf.load_dense_state_dict(model, dense_state, generator=generator)
    before = whole_state(model)
    train(model, my_part(rank, BATCHES))
    return before, whole_state(model)


@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")
@pytest.mark.parametrize("fuse_on", ["step", "forward"])
@pytest.mark.parametrize("variant", ["dw", "mb"])
def test_a_model_on_the_meta_device_is_sharded_and_gets_a_checkpoint(
    fuse_on: str, variant: str
) -> None:
    dense, config = dense_model(), settings_of(fuse_on, variant)
    one = exf.wrap(copy.deepcopy(dense), config)
    generator = torch.Generator().manual_seed(5)
    exf.load_dense_state_dict(one, dense.state_dict(), generator=generator)
    befores, afters = zip(*on_threads(2, from_meta, config, dense.state_dict()), strict=True)
    assert_same(befores, one.state_dict())
    assert_same(afters, train(one, BATCHES).state_dict())


def drawn_again(rank: int, dense: nn.Module, config: Any) -> dict[str, Tensor]:
    model = exf.fully_shard(exf.wrap(copy.deepcopy(dense), config), mesh=mesh_of(2))
    linear: Any = model.blocks[0].fc1
    torch.manual_seed(3)
    linear.reset_parameters()
    bank = linear.parametrizations.weight[0].fusion_weights
    torch.manual_seed(4)
    bank.reset_parameters()
    return whole_state(model)


@pytest.mark.processes
def test_experts_that_are_drawn_again_are_those_of_one_rank() -> None:
    dense, config = dense_model(), settings_of("forward")
    one: Any = exf.wrap(copy.deepcopy(dense), config)
    torch.manual_seed(3)
    one.blocks[0].fc1.reset_parameters()
    torch.manual_seed(4)
    one.blocks[0].fc1.parametrizations.weight[0].fusion_weights.reset_parameters()
    states = on_ranks(2, drawn_again, dense, config)
    for state in states:
        for name, tensor in one.state_dict().items():
            torch.testing.assert_close(state[name], tensor, **EXACT, msg=name)
