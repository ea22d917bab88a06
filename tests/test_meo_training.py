"""Training under MEO: balance, loops, ranks, compile, precision, and models of others."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import exfusion_param as exf
from exfusion_param import meo
from exfusion_param.meo.gating import squared_variation
from exfusion_testing.compilers import COMPILER
from exfusion_testing.meo_models import dense, gate_of, with_random_gates, wrap, wrapped
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.ranks import on_ranks, on_threads
from exfusion_testing.sharded import mesh_of, my_part, whole_state

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*view tensor:UserWarning")


def train(model: nn.Module, batches: list[Tensor], run: Any = None) -> list[float]:
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.05), lr=0.02)
    losses = []
    for i, x in enumerate(batches):
        torch.manual_seed(i)
        loss = loss_of(model if run is None else run, x) + meo.balance_loss(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_the_balance_loss_is_that_of_the_gates_that_were_recorded() -> None:
    model = wrapped(balance_weight=0.5).train()
    model(inputs())
    said = [gate_of(linear).recorded for block in model.blocks for linear in (block.fc1, block.fc2)]
    assert [len(each) for each in said] == [1, 1, 1, 1]
    expected = sum(
        0.5 * (squared_variation(gates.importance) + squared_variation(gates.load))
        for (gates,) in said
    )
    loss = meo.balance_loss(model)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    loss.backward()
    for gate in (gate_of(model.blocks[0].fc1), gate_of(model.blocks[1].fc2)):
        assert gate.gate.grad.any()
        assert gate.noise.grad.any()


def test_the_balance_loss_is_that_of_only_the_last_forward_in_training() -> None:
    model = wrapped().train()
    model(inputs(seed=1))
    torch.manual_seed(0)
    model(inputs())
    twice = meo.balance_loss(model)
    fresh = wrapped().train()
    torch.manual_seed(0)
    fresh(inputs())
    torch.testing.assert_close(twice, meo.balance_loss(fresh), rtol=0, atol=0)
    model.eval()(inputs())
    assert meo.balance_loss(model).item() == 0
    with torch.no_grad():
        model.train()(inputs())
        assert meo.balance_loss(model).item() == 0
    with pytest.raises(RuntimeError, match="comes after a forward in training"):
        meo.balance_loss(model)
    with pytest.raises(ValueError, match="has no gates"):
        meo.balance_loss(FFNs())


def test_a_step_lets_the_graph_go_and_metrics_name_the_mean_gates() -> None:
    model = wrapped().train()
    train(model, [inputs()])
    gate = gate_of(model.blocks[0].fc1)
    assert gate.recorded == ()
    values = exf.metrics(model)
    shares = [values[f"fusion_weights/blocks.0.fc1/{i}"] for i in range(5)]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    copy.deepcopy(model)


def test_training_with_the_balance_loss_evens_the_load_out() -> None:
    torch.manual_seed(0)
    x = inputs(4, 64, 3)
    spread = {}
    for weight in (0.0, 0.5):
        model = with_random_gates(
            meo.wrap(FFNs().double(), num_experts=5, top_k=1, seed=1, balance_weight=weight), 2.0
        )
        train(model, [x] * 60)
        model(x)
        gates = gate_of(model.blocks[0].fc1).recorded[0]
        spread[weight] = squared_variation(gates.importance).item()
    assert spread[0.5] < 0.3 * spread[0.0]


def test_micro_batches_add_up() -> None:
    model, twin = wrapped(gating="softmax", top_k=None).train(), None
    twin = copy.deepcopy(model)
    x = inputs(4, 8, 9)
    loss_of(model, x).backward()
    for part in x.chunk(4):
        (loss_of(twin, part) / 4).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", ["task", "sequence", "token"])
def test_activation_checkpointing_changes_nothing(level: Any) -> None:
    fields: dict[str, Any] = {"task_dim": 2} if level == "task" else {}
    results = []
    for checkpointing in (None, "non-reentrant"):
        plain = dense()
        plain.checkpointing = checkpointing  # type: ignore[assignment]
        model = wrap(plain, level=level, **fields)
        if level == "task":
            meo.set_task(model, 1)
        results.append((train(model, [inputs(seed=i) for i in range(3)]), model.state_dict()))
    (losses, state), (checkpointed, other) = results
    assert losses == pytest.approx(checkpointed, abs=1e-12)
    torch.testing.assert_close(dict(state), dict(other), rtol=0, atol=1e-9)


def test_reentrant_checkpointing_has_no_graph_of_the_gates_to_balance() -> None:
    plain = dense()
    plain.checkpointing = "reentrant"
    model = wrap(plain).train()
    loss = loss_of(model, inputs())
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        meo.balance_loss(model)
    loss.backward()  # trains without it


@pytest.mark.compiled
@pytest.mark.parametrize("level", ["task", "sequence", "token"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shared_gate", [False, True])
def test_compiled_equals_eager(level: Any, causal: bool, shared_gate: bool) -> None:
    if causal and level == "task":
        return
    fields: dict[str, Any] = {"task_dim": 2} if level == "task" else {"causal": causal}
    fields |= {"segment_length": 4, "gating": "softmax", "top_k": None}
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = wrapped(8, 16, level=level, shared_gate=shared_gate, **fields).float()
        if level == "task":
            meo.set_task(model, 1)
        run = torch.compile(model, fullgraph=True, backend=COMPILER) if compiled else model
        losses = train(model, [inputs(8, 3, 10, seed=i).float() for i in range(3)], run)
        results.append((losses, run.eval()(inputs(8, 3, 10).float())))
    torch.compiler.reset()
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-4)


@pytest.mark.compiled
def test_noise_compiles_in_one_graph() -> None:
    torch.compiler.reset()
    model = wrapped(8, 16).float().train()
    run = torch.compile(model, fullgraph=True, backend=COMPILER)
    losses = train(model, [inputs(8, 3, 10, seed=i).float() for i in range(3)], run)
    torch.compiler.reset()
    assert all(torch.tensor(losses).isfinite())
    assert all(p.isfinite().all() for p in model.parameters())


def test_autocast_and_bfloat16_models_train() -> None:
    model = meo.wrap(FFNs(8, 16), seed=0)
    x = inputs(8, 3, 30).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, x) + meo.balance_loss(model)
    loss.backward()
    assert gate_of(model.blocks[0].fc1).gate.grad.dtype == torch.float32
    model = meo.wrap(FFNs(8, 16), seed=0).bfloat16()
    (loss_of(model, x.bfloat16()) + meo.balance_loss(model)).backward()
    gate = gate_of(model.blocks[0].fc1)
    assert gate.gate.dtype == gate.gate.grad.dtype == torch.float32
    assert model.blocks[0].fc1.parametrizations.weight.original.grad.dtype == torch.bfloat16


def trained_on_ranks(
    rank: int, plain: nn.Module, way: str, shape: Any, fields: dict[str, Any]
) -> dict[str, Tensor]:
    model = wrap(copy.deepcopy(plain), **fields).train()
    batches = [inputs(5, 12, 4, seed=seed) for seed in range(3)]
    if way == "ddp":
        run = DistributedDataParallel(model)
    else:
        model = run = exf.fully_shard(model, mesh=mesh_of(*shape))
    optimizer = torch.optim.SGD(exf.param_groups(model, 0.1), lr=0.2, momentum=0.9)
    for x in my_part(rank, batches):
        loss = loss_of(run, x) + meo.balance_loss(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole_state(model)


def one_rank(fields: dict[str, Any]) -> dict[str, Tensor]:
    model = wrapped(5, 8, **fields).train()
    optimizer = torch.optim.SGD(exf.param_groups(model, 0.1), lr=0.2, momentum=0.9)
    for seed in range(3):
        (loss_of(model, inputs(5, 12, 4, seed=seed)) + meo.balance_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict())


EVEN: dict[str, Any] = {"gating": "softmax", "top_k": None}
"""Noise is drawn by each rank for its own samples, so that runs with it are not comparable."""


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2)])
@pytest.mark.parametrize(
    "fields", [EVEN, EVEN | {"level": "token", "shared_gate": True, "causal": True}]
)
def test_k_sharded_ranks_equal_one(shape: tuple[int, ...], fields: dict[str, Any]) -> None:
    expected = one_rank(fields)
    for state in on_threads(
        torch.Size(shape).numel(), trained_on_ranks, dense(5, 8), "fsdp", shape, fields
    ):
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-9)


@pytest.mark.processes
def test_two_ddp_ranks_equal_one() -> None:
    expected = one_rank(EVEN)
    for state in on_ranks(2, trained_on_ranks, dense(5, 8), "ddp", (2,), EVEN):
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-9)


def noisy(rank: int) -> bool:
    torch.manual_seed(rank)
    model = exf.fully_shard(wrapped(5, 8).train(), mesh=mesh_of(2))
    loss = loss_of(model, inputs(5, 3, 4, seed=rank)) + meo.balance_loss(model)
    loss.backward()
    return all(p.grad is not None for p in model.parameters())


@pytest.mark.processes
def test_noise_trains_on_shards() -> None:
    assert all(on_ranks(2, noisy))
