"""FSDP2: a ViT with experts on any number of GPUs or CPUs, of any size.

    torchrun --nproc-per-node 2 fsdp_train.py --out runs/fsdp

Stop it and run the same command, on any number of ranks: it continues after the last checkpoint.
Needs exfusion_param, safetensors, timm, tqdm and tyro. Copy this file, and replace `make_images`
and `build` with your own. A dense script lacks only the lines marked "ExFusion".
"""

import dataclasses
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import distribute_tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR
from tqdm import tqdm

import exfusion_param as exf
from exfusion_param.checkpoint import Checkpoints
from exfusion_param.history import append_row, drop_rows_after


@dataclasses.dataclass
class Settings:
    """Train a ViT under FSDP2."""

    out: Path = Path("runs/fsdp")  # the folder for checkpoints, metrics.csv and the dense model
    dim: int = 192  # features of a token
    depth: int = 6  # blocks
    heads: int = 3  # attention heads of a block
    num_experts: int = 4  # of each linear
    batch_size: int = 128  # images of a step, on all ranks together
    steps: int = 400  # to train in all; more of them continue a run that has ended
    lr: float = 1e-3  # the highest learning rate
    warmup: int = 40  # steps up to it
    replicas: int = 1  # of the sharded model (HSDP), such as one for each node
    bf16: bool = False  # compute in bfloat16; weights, experts and sums over ranks stay in float32
    checkpointing: bool = False  # recompute activations in backward instead of keeping them
    compile: bool = False  # each block
    save_every: int = 100  # steps between checkpoints
    log_every: int = 10  # steps between rows of metrics.csv
    smoke: bool = False  # a few images and steps, to see that everything works


def make_images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Stand-in for your data: ten patterns under noise, (count, 1, 28, 28), and their numbers."""
    patterns = torch.randn(10, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=draw)
    return patterns[labels] + 3 * torch.randn(count, 1, 28, 28, generator=draw), labels


def build(settings: Settings) -> Any:
    """The dense model, without biases of queries and keys, as ViT-22B."""
    dims: dict[str, Any] = {"embed_dim": settings.dim, "num_heads": settings.heads}
    return VisionTransformer(28, 7, 1, 10, depth=settings.depth, qkv_bias=False, **dims)


@torch.no_grad()
def build_sharded(settings: Settings, device: torch.device, world: int) -> Any:
    """The model; each rank only ever holds its own part of it."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = build(settings)
        # ExFusion; with this bank training starts from the weights that are drawn below
        exf.wrap(model, num_experts=settings.num_experts, fuse_on="step", bank_init="uniform")
    model.set_grad_checkpointing(settings.checkpointing)
    shape = (settings.replicas, world // settings.replicas)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(torch.bfloat16 if settings.bf16 else None, torch.float32)
    exf.fully_shard(model, mesh=mesh, mp_policy=policy)  # ExFusion, for torch's on each block
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        if ".fusion_weights." in name:  # ExFusion: to_empty has started them
            continue
        value = torch.full(parameter.shape, float(name.endswith("weight")), device=device)
        if value.ndim > 1:  # drawn whole, so that it does not depend on the number of ranks
            nn.init.trunc_normal_(value, std=0.02)
        parameter.copy_(distribute_tensor(value, mesh, parameter.placements, src_data_rank=None))
    for block in model.blocks if settings.compile else ():
        block.compile()
    return model


def main(settings: Settings) -> None:
    """Train, after the last checkpoint if there is one; test; export the dense model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group()  # torchrun says where the other ranks are
    rank, world, size = distributed.get_rank(), distributed.get_world_size(), settings.batch_size
    if settings.smoke:
        size, settings.steps = 16, min(settings.steps, 6)
    images, labels = make_images(64 if settings.smoke else 4096, seed=1)
    model = build_sharded(settings, device, world)
    groups = exf.param_groups(model, weight_decay=0.05)  # ExFusion, for model.parameters()
    optimizer = exf.ExpertAdamW(groups, lr=settings.lr)  # ExFusion, or any other optimizer
    scheduler = LinearLR(optimizer, start_factor=0.01, total_iters=settings.warmup)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    checkpoints = Checkpoints(settings.out / "checkpoints", parts, keep=1)
    done, dense, log = checkpoints.resume(), settings.out / "dense", settings.out / "metrics.csv"
    settings.out.mkdir(parents=True, exist_ok=True)
    if rank == 0 and log.exists():
        drop_rows_after(log, done or -1)
    for step in tqdm(range(done + 1, settings.steps + 1), disable=rank > 0):
        epoch, index = divmod(step - 1, len(images) // size)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        mine = order[index * size :][:size][rank::world]  # of a batch that is the same for all
        loss = F.cross_entropy(model(images[mine].to(device)), labels[mine].to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % settings.log_every == 0 or step == settings.steps:
            distributed.all_reduce(mean := loss.detach() / world)
            row = {"step": step, "loss": mean.item(), "time": time.time()}
            row |= exf.metrics(model)  # ExFusion, on all ranks together
            if rank == 0:
                append_row(log, row)
        if step % settings.save_every == 0 or step == settings.steps:
            checkpoints.save(step)
    images, labels = make_images(64 if settings.smoke else 1024, seed=2)
    with torch.no_grad():
        right = model.eval()(images.to(device)).argmax(1).cpu() == labels  # on all ranks together
    if rank == 0:
        print(f"test accuracy {100 * right.float().mean():.1f} %; the dense model is in {dense}")
        shutil.rmtree(dense, ignore_errors=True)  # parts by another number of ranks
    distributed.barrier()
    writer = HuggingFaceStorageWriter(str(dense), save_distributed=True, enable_consolidation=True)
    save(exf.fused_state_dict(model), storage_writer=writer)  # ExFusion, for model.state_dict()
    distributed.barrier()  # a rank that leaves early would take its connections along
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Settings))
