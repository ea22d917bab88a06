"""Sharded models in accelerate and Lightning, as the README has it."""

import os
from pathlib import Path

import lightning
import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

import exfusion_param as exf
from exfusion_param.integrations.lightning import ExFusionCallback
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.ranks import on_ranks
from exfusion_testing.sharded import assert_same, mesh_of, my_part, whole_state

pytestmark = pytest.mark.filterwarnings("ignore")

BATCHES = [inputs(batch=8, seed=seed) for seed in range(4)]
CONFIG = exf.ExFusionConfig(fuse_on="step", num_experts=3, bank_init="uniform", seed=1)


def dense_model() -> nn.Module:
    torch.manual_seed(0)
    return FFNs().double()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(exf.param_groups(model, 0.1), lr=0.02)


def on_one_rank(batches: list[Tensor], max_norm: float = 0.1) -> dict[str, Tensor]:
    model = exf.wrap(dense_model(), CONFIG)
    optimizer = optimizer_of(model)
    for batch in batches:
        loss_of(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def set_environment(rank: int, ranks: int) -> None:
    """What torchrun sets."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in values.items()})
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # unused: the group exists


def by_accelerate(rank: int, folder: Path, has_plugin: bool) -> dict[str, Tensor]:
    set_environment(rank, 2)
    accelerator = Accelerator(cpu=True)
    if has_plugin:  # accelerate takes the plugin only on accelerators
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2
        )
    model = exf.fully_shard(exf.wrap(dense_model(), CONFIG), mesh=mesh_of(2))
    optimizer = optimizer_of(model)
    if has_plugin:
        model, optimizer = accelerator.prepare(model, optimizer)
    else:
        optimizer = accelerator.prepare(optimizer)
    for batch in my_part(rank, BATCHES):
        accelerator.backward(loss_of(model, batch))
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return whole_state(model)


@pytest.mark.processes
@pytest.mark.parametrize("has_plugin", [False, True])
def test_accelerate_equals_one_rank(tmp_path: Path, has_plugin: bool) -> None:
    assert_same(on_ranks(2, by_accelerate, tmp_path, has_plugin), on_one_rank(BATCHES))


class Module(lightning.LightningModule):
    """The README's recipe."""

    def __init__(self, shards: bool) -> None:
        super().__init__()
        self.model = exf.wrap(dense_model(), CONFIG)
        self.shards = shards

    def configure_model(self) -> None:
        if self.shards and not isinstance(self.model, torch.distributed.fsdp.FSDPModule):
            exf.fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return loss_of(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self)


def by_lightning(rank: int, folder: Path, shards: bool, epochs: list[int]) -> dict[str, Tensor]:
    set_environment(rank, 2)
    loader = DataLoader(my_part(rank, BATCHES), batch_size=None)
    checkpoint = None
    for max_epochs in epochs:
        module = Module(shards)
        trainer = trainer_of(folder, shards, max_epochs)
        trainer.fit(module, loader, ckpt_path=checkpoint)
        checkpoint = str(folder / f"{max_epochs}.ckpt")
        trainer.save_checkpoint(checkpoint)
    return whole_state(module.model)


def trainer_of(folder: Path, shards: bool, max_epochs: int) -> lightning.Trainer:
    sharding = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=sharding if shards else DDPStrategy(),
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
@pytest.mark.parametrize("shards", [False, True])
def test_lightning_equals_one_rank_and_resumes(tmp_path: Path, shards: bool) -> None:
    states = on_ranks(2, by_lightning, tmp_path, shards, [1, 2])
    assert_same(states, on_one_rank(2 * BATCHES, max_norm=1e9))
