"""Tensor parallelism with and without FSDP2: k ranks equal one, in the order of torchtitan."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import exfusion_param as exf
from exfusion_param.tensors.shards import full_tensor, local
from exfusion_testing.compilers import COMPILER
from exfusion_testing.parallel_models import (
    FFN,
    sequence_and_loss_parallel,
    tensor_parallel,
    train,
    transformer,
)
from exfusion_testing.ranks import on_ranks, on_threads

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*view tensor:UserWarning")
VARIANTS = ["sw", "dw", "mb"]
RANKS = 4
Engine = Callable[[Any], Any]


def stock(model: Any, mesh: Any) -> Any:
    """FSDP2 as torch has it, block by block."""
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def mesh_of(*shape: int) -> Any:
    names = ("pure",) * (len(shape) == 1) + ("replicate", "data", "tensor")[-len(shape) :]
    return init_device_mesh("cpu", shape, mesh_dim_names=names[-len(shape) :])


def tensors_only(model: Any) -> Any:
    return tensor_parallel(model, mesh_of(4))


def with_fsdp2(model: Any) -> Any:
    mesh = mesh_of(2, 2)
    return stock(sequence_and_loss_parallel(model, mesh["tensor"]), mesh["data"])


def attention_only(model: Any) -> Any:
    mesh = mesh_of(2, 2)
    tensor_parallel(model, mesh["tensor"], "attention")
    return exf.fully_shard(model, mesh=mesh["data"])


def checkpointed(model: Any) -> Any:
    mesh = mesh_of(2, 2)
    sequence_and_loss_parallel(model, mesh["tensor"])
    for name, layer in model.layers.named_children():
        model.layers.register_module(name, checkpoint_wrapper(layer))
    return stock(model, mesh["data"])


def compiled(model: Any) -> Any:
    """Neither checkpointed nor with sequence parallelism: torch 2.13 errs on the dense model."""
    torch.compiler.reset()
    mesh = mesh_of(2, 2)
    tensor_parallel(model, mesh["tensor"])
    for layer in model.layers:
        layer.compile(backend=COMPILER, fullgraph=True)
    return stock(model, mesh["data"])


def with_hsdp(model: Any) -> Any:
    mesh = mesh_of(2, 1, 2)
    sequence_and_loss_parallel(model, mesh["tensor"])
    return stock(model, mesh["replicate", "data"])


ENGINES: dict[str, tuple[Engine, int]] = {
    "tensors only": (tensors_only, 1),
    "loss parallel, FSDP2": (with_fsdp2, 2),
    "attention only, exf.fully_shard": (attention_only, 2),
    "checkpointed, FSDP2": (checkpointed, 2),
    "compiled, FSDP2": (compiled, 2),
    "loss parallel, HSDP": (with_hsdp, 2),
}
"""How a model is parallelized, and over how many parts of the batch."""


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return exf.ExpertAdamW(exf.param_groups(model, 0.1), lr=0.02)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    return {name.replace("_checkpoint_wrapped_module.", ""): full_tensor(tensor).detach().clone()
            for name, tensor in model.state_dict().items()}  # fmt: skip


def on_each_engine(rank: int) -> dict[str, dict[str, Tensor]]:
    results = {}
    for name, (engine, parts) in ENGINES.items():
        for variant in VARIANTS:
            model = engine(transformer(variant))
            train(model, make_optimizer(model), rank * parts // RANKS, parts)
            results[f"{name}/{variant}"] = whole_state(model)
    return results


def expected(variant: str, fuse_on: str = "step") -> dict[str, Tensor]:
    model = transformer(variant, fuse_on)
    return train(model, make_optimizer(model)).state_dict()


@pytest.fixture(scope="module")
def results() -> list[dict[str, dict[str, Tensor]]]:
    return on_ranks(RANKS, on_each_engine)


@pytest.mark.processes
@pytest.mark.compiled
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_four_ranks_equal_one(engine: str, variant: str, results: list[Any]) -> None:
    for states in results:
        state = states[f"{engine}/{variant}"]
        torch.testing.assert_close(state, dict(expected(variant)), rtol=0, atol=1e-9)


def in_three_dimensions(rank: int, models: list[Any]) -> dict[str, Tensor]:
    mesh = mesh_of(2, 2, 2)
    model = tensor_parallel(models[rank], mesh["tensor"])
    model = stock(model, mesh["replicate", "data"])
    train(model, make_optimizer(model), rank // 2, 4)
    return whole_state(model)


def test_eight_ranks_in_three_dimensions_equal_one() -> None:
    for state in on_threads(8, in_three_dimensions, [transformer("mb") for _ in range(8)]):
        torch.testing.assert_close(state, dict(expected("mb")), rtol=0, atol=1e-9)


def attention_on_forward(rank: int, variant: str) -> list[dict[str, Tensor]]:
    states = []
    for engine, parts in ((tensors_of_attention, 1), (attention_only, 2)):
        model = engine(transformer(variant, "forward"))
        optimizer = torch.optim.AdamW(exf.param_groups(model, 0.1), lr=0.02)
        train(model, optimizer, rank * parts // RANKS, parts)
        states.append(whole_state(model))
    return states


def tensors_of_attention(model: Any) -> Any:
    return tensor_parallel(model, mesh_of(4), "attention")


@pytest.mark.processes
@pytest.mark.parametrize("variant", ["mb"])
def test_the_attention_is_split_where_experts_fuse_at_each_forward(variant: str) -> None:
    results = on_ranks(RANKS, attention_on_forward, variant)
    for state in (state for states in results for state in states):
        torch.testing.assert_close(state, dict(expected(variant, "forward")), rtol=0, atol=1e-9)


PLANS = {"all": FFN, **{name: {name: style} for name, style in FFN.items()}}


def split_ffn_on_forward(rank: int, plan: str | None) -> str:
    model = transformer("mb", "forward")
    before = list(model.state_dict())
    try:
        if plan is None:
            exf.wrap(tensor_parallel(exf.fuse(model), mesh_of(2)))
        else:
            parallelize_module(model.layers[0], mesh_of(2), PLANS[plan])
    except (TypeError, ValueError) as error:
        assert plan is None or list(model.state_dict()) == before
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize("plan", [*PLANS, None])
def test_splitting_the_ffn_needs_experts_that_fuse_at_the_step(plan: str | None) -> None:
    for said in on_threads(2, split_ffn_on_forward, plan):
        assert 'fuse_on="step"' in said
        assert "ensor parallelism" in said


def with_spmd_mesh(rank: int) -> dict[str, Tensor]:
    mesh, whole_on_all = mesh_of(2, 2), [Replicate(), Replicate()]
    model = transformer()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            spread = distribute_tensor(parameter.detach(), mesh, whole_on_all)
            setattr(module, name, nn.Parameter(spread))
    dims = fsdp.DataParallelMeshDims(shard="data")  # not in torch 2.11
    exf.fully_shard(model, mesh=mesh, dp_mesh_dims=dims, shard_placement_fn=by_columns)
    return {name: local(p).detach() for name, p in model.layers[0].named_parameters()}


def by_columns(parameter: nn.Parameter) -> Any:
    return Shard(1) if parameter.ndim == 2 and parameter.shape[1] % 4 == 0 else None


def test_newer_arguments_of_torch_pass_through() -> None:
    parts = on_threads(4, with_spmd_mesh)[0]
    assert parts["feed_forward.w1.weight"].shape == (16, 4)
    assert parts["attention_norm.weight"].shape == (4,)
