"""`fuse_on="step"` under the user's own engines: k ranks equal one, and `wrap` is the only call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import exfusion_param as exf
from exfusion_param.tensors.shards import full_tensor
from exfusion_testing.ranks import on_ranks

pytestmark = pytest.mark.processes

RANKS = 4
VARIANTS = ["sw", "dw", "mb"]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.02),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "ExpertAdamW": lambda params: exf.ExpertAdamW(params, lr=0.02),
}


class Block(nn.Module):
    """A residual FFN with a norm."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to the same."""
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


class Model(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Block(8, 16) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, 6) to (batch, tokens, 3)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def wrapped(variant: Any) -> nn.Module:
    torch.manual_seed(0)
    return exf.wrap(Model().double(), variant=variant, fuse_on="step", bank_init="uniform")


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 4, 6, generator=generator, dtype=torch.float64) for _ in range(4)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, part: slice) -> nn.Module:
    for batch in batches():
        y = model(batch[part])
        (y.square() + y.sin()).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(model: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def hsdp(model: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for block in model.blocks:
        plan = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
        parallelize_module(block, mesh["tensor"], plan)
        fully_shard(block, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


def sequence_parallel(model: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    shard: Any = Shard(1)
    for block in model.blocks:
        plan = {
            "norm": SequenceParallel(),
            "fc1": ColwiseParallel(input_layouts=shard),
            "fc2": RowwiseParallel(output_layouts=shard),
        }
        parallelize_module(block, mesh["tensor"], plan)
    into = {
        "stem": RowwiseParallel(input_layouts=Replicate(), output_layouts=shard),
        "head": ColwiseParallel(input_layouts=shard, output_layouts=Replicate()),
    }
    parallelize_module(model, mesh["tensor"], into)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


ENGINES: dict[str, tuple[Callable[[nn.Module], nn.Module], int]] = {
    "DDP": (ddp, 4),
    "FSDP2": (fsdp2, 4),
    "HSDP": (hsdp, 4),
    "tensor parallelism under FSDP2": (tensor_parallel, 2),
    "sequence parallelism under FSDP2": (sequence_parallel, 2),
}
"""How a model is parallelized, and over how many parts of the batch."""


def on_each_engine(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, (engine, parts) in ENGINES.items():
        for variant in VARIANTS:
            for kind, make in OPTIMIZERS.items():
                model = engine(wrapped(variant))
                size = 8 // parts
                start = size * (rank * parts // RANKS)
                train(model, make(model.parameters()), slice(start, start + size))
                state = {key.removeprefix("module."): full_tensor(value).detach().clone()
                         for key, value in model.state_dict().items()}  # fmt: skip
                results[f"{name}/{variant}/{kind}"] = state
    return results


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return on_ranks(RANKS, on_each_engine)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_k_ranks_equal_one(
    engine: str, variant: str, kind: str, results: list[dict[str, Any]]
) -> None:
    model = wrapped(variant)
    expected = train(model, OPTIMIZERS[kind](model.parameters()), slice(None)).state_dict()
    for states in results:
        state = states[f"{engine}/{variant}/{kind}"]
        torch.testing.assert_close(state, dict(expected), rtol=0, atol=1e-9)
