"""Sharded models in Lightning: by DDP, by FSDP2, and by FSDP2 over tensor parallelism."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

import exfusion_param as exf
from exfusion_param.integrations.lightning import ExFusionCallback
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.ranks import on_ranks
from exfusion_testing.sharded import assert_same, set_environment, whole_state

pytestmark = pytest.mark.filterwarnings("ignore")

BATCHES = [inputs(batch=8, seed=seed) for seed in range(4)]
CONFIG = exf.ExFusionConfig(fuse_on="step", num_experts=3, bank_init="uniform", seed=1)


def dense_model() -> nn.Module:
    torch.manual_seed(0)
    return FFNs().double()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(exf.param_groups(model, 0.1), lr=0.02)


def on_one_rank(batches: list[Tensor]) -> dict[str, Tensor]:
    model = exf.wrap(dense_model(), CONFIG)
    optimizer = optimizer_of(model)
    for batch in batches:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


class Module(lightning.LightningModule):
    """The recipe of docs/tutorials/fsdp2.md, and tensor parallelism before it."""

    def __init__(self, tensors: int | None) -> None:
        super().__init__()
        self.model: Any = exf.wrap(dense_model(), CONFIG)
        self.tensors = tensors  # ranks that share each linear; None for DDP

    def configure_model(self) -> None:
        if self.tensors is None or isinstance(self.model, torch.distributed.fsdp.FSDPModule):
            return
        for block in self.model.blocks if self.tensors > 1 else []:
            plan = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
            parallelize_module(block, self.device_mesh["tensor_parallel"], plan)
        exf.fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return loss_of(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self)


def by_lightning(
    rank: int, folder: Path, tensors: int | None, epochs: list[int]
) -> dict[str, Tensor]:
    shared = tensors or 1
    set_environment(rank, 2 * shared)
    loader = DataLoader([batch.chunk(2)[rank // shared] for batch in BATCHES], batch_size=None)
    checkpoint = None
    for max_epochs in epochs:
        module = Module(tensors)
        trainer = trainer_of(folder, tensors, max_epochs)
        trainer.fit(module, loader, ckpt_path=checkpoint)
        checkpoint = str(folder / f"{max_epochs}.ckpt")
        trainer.save_checkpoint(checkpoint)
    return whole_state(module.model)


def trainer_of(folder: Path, tensors: int | None, max_epochs: int) -> lightning.Trainer:
    shared = tensors or 1
    sharding = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=shared)
    return lightning.Trainer(
        accelerator="cpu",
        devices=2 * shared,
        strategy=DDPStrategy() if tensors is None else sharding,
        max_epochs=max_epochs,
        callbacks=[ExFusionCallback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )


@pytest.mark.processes
@pytest.mark.parametrize("tensors", [None, 1, 2])
def test_lightning_equals_one_rank_and_resumes(tmp_path: Path, tensors: int | None) -> None:
    states = on_ranks(2 * (tensors or 1), by_lightning, tmp_path, tensors, [1, 2])
    assert_same(states, on_one_rank(2 * BATCHES))
