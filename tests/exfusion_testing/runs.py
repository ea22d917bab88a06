"""A training run that the tests of checkpoints save, break and resume."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

import exfusion_param as exf
from exfusion_param.checkpoint import Checkpoints
from exfusion_param.tensors.shards import full_tensor
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.sharded import mesh_of


class Run:
    """A small wrapped model with dropout, ExpertAdamW and a scheduler.

    Args:
        folder: of the checkpoints.
        shards: sharded by FSDP2 over the ranks.
        replicas: of the model, each sharded over as many of the ranks (HSDP).
        fields: of the config; "optimizer" is a class, and "state_dtype" its argument.
        keep: checkpoints that stay.
        asynchronous: checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        *,
        shards: bool = False,
        replicas: int = 1,
        keep: int | None = 3,
        asynchronous: bool = False,
        optimizer: Any = exf.ExpertAdamW,
        state_dtype: Any = None,
        seed: int = 0,
        **fields: Any,
    ) -> None:
        torch.manual_seed(seed)
        model = nn.Sequential(FFNs(hidden=7).double(), nn.Dropout(0.1))
        settings = {"num_experts": 3, "bank_init": "uniform", "seed": 1} | fields
        self.model: nn.Module = exf.wrap(model, **settings)
        if shards:
            shape = (replicas, distributed.get_world_size() // replicas)
            exf.fully_shard(self.model, mesh=mesh_of(*shape[replicas == 1 :]))
        more = {} if state_dtype is None else {"state_dtype": state_dtype}
        groups = exf.param_groups(self.model, 0.1)
        self.optimizer = optimizer(groups, lr=0.02, **more)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        self.checkpoints = Checkpoints(folder, parts, keep=keep, asynchronous=asynchronous)

    def train(self, start: int, stop: int, part: slice = slice(None)) -> "Run":
        """Steps `start` to `stop`, on a part of each batch."""
        for step in range(start, stop):
            self.backward(inputs(batch=8, seed=step)[part])
            self.step()
        return self

    def backward(self, batch: Tensor) -> None:
        """A micro-batch."""
        loss_of(self.model, batch).backward()

    def step(self) -> None:
        """An optimizer's step."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def state(self) -> dict[str, Tensor]:
        """The whole model, on every rank."""
        return {
            name: full_tensor(tensor).clone() for name, tensor in self.model.state_dict().items()
        }


def assert_equal(states: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    """Bit by bit."""
    for state in states:
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(state[name], tensor), name


def resumed(folder: Path, **settings: Any) -> Run:
    """Another run, resumed from step 3."""
    run = Run(folder, seed=5, **settings)
    assert run.checkpoints.resume() == 3
    return run
