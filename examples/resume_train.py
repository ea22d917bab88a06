"""A run that can be killed at any moment: run the same command again, and it continues bit by bit.

    python resume_train.py
    torchrun --nproc-per-node 2 --max-restarts 3 resume_train.py --out runs/resume2

torchdata's StatefulDataLoader takes the order of the data along, wherever in an epoch the run was.
On SIGTERM, which clusters send before they take a machine back, and Ctrl-C it saves and ends.
Needs exfusion_param, safetensors, timm, torchdata, tqdm and tyro. Copy this file and replace
`make_images` with your data and `build` with your model. A script for a dense model lacks only the
lines marked "ExFusion"; `Checkpoints` and `StopRequest` serve it as well.
"""

import dataclasses
import os
from pathlib import Path

import timm
import torch
import tyro
from torch import distributed, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
from tqdm import tqdm

import exfusion_param as exf
from exfusion_param.checkpoint import Checkpoints, StopRequest
from exfusion_param.history import append_row


@dataclasses.dataclass
class Settings:
    """Train a small ViT, and continue it."""

    out: Path = Path("runs/resume")  # the folder for checkpoints, metrics.csv and the dense model
    epochs: int = 4  # passes over the training images
    batch_size: int = 64  # images of a step on each rank
    lr: float = 1e-3  # the highest learning rate
    dim: int = 96  # features of a token
    depth: int = 4  # blocks
    save_every: int = 50  # steps between checkpoints
    asynchronous: bool = True  # write checkpoints while the run goes on
    limit: int = 4096  # training images
    smoke: bool = False  # a few images, to see that everything works


def make_images(count: int, seed: int) -> TensorDataset:
    """Stand-in for your data: one of ten patterns under noise, (1, 28, 28), and its number."""
    patterns = torch.randn(10, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=draw)
    noise = torch.randn(count, 1, 28, 28, generator=draw)
    return TensorDataset(patterns[labels] + 3 * noise, labels)


def build(settings: Settings) -> nn.Module:
    """A small ViT with dropout, alike on all ranks."""
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=28, patch_size=7, in_chans=1, num_classes=10,
        embed_dim=settings.dim, depth=settings.depth, num_heads=4, proj_drop_rate=0.1,
    )  # fmt: skip


def start_process_group() -> torch.device:
    """Join the job that torchrun has started, or be one of a single process; this rank's device."""
    if "RANK" in os.environ:
        # When torchrun restarts ranks its store still holds the addresses of the dead ones.
        store, rank, count = next(rendezvous("env://"))
        store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        distributed.init_process_group(store=store, rank=rank, world_size=count)
    else:
        distributed.init_process_group(None, "tcp://localhost:0", rank=0, world_size=1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main(settings: Settings) -> None:
    """Train from the last checkpoint on, and export the dense model."""
    device = start_process_group()
    rank = distributed.get_rank()
    if settings.smoke:
        settings.epochs, settings.limit, settings.save_every = 2, 256, 2
    settings.out.mkdir(parents=True, exist_ok=True)
    images = make_images(settings.limit, seed=1)
    sampler = StatefulDistributedSampler(images, shuffle=True, drop_last=True)
    order = torch.Generator()  # its own, else each start of an epoch draws from that of dropout
    loader = StatefulDataLoader(
        images, settings.batch_size, sampler=sampler, drop_last=True, generator=order
    )
    model = build(settings)
    exf.wrap(model, fuse_on="step").to(device)  # ExFusion
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    exf.fully_shard(model, mesh=mesh)  # ExFusion, for torch's on each block
    groups = exf.param_groups(model, weight_decay=0.05)  # ExFusion, for model.parameters()
    optimizer = exf.ExpertAdamW(groups, lr=settings.lr)  # ExFusion, or any other optimizer
    steps = settings.epochs * len(loader)
    scheduler = OneCycleLR(optimizer, settings.lr, total_steps=steps, cycle_momentum=False)

    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    checkpoints = Checkpoints(settings.out, parts, asynchronous=settings.asynchronous)
    stop = StopRequest()
    step = checkpoints.resume()
    if step == 0:
        torch.manual_seed(rank)  # for dropout; a resumed run draws on
    bar = tqdm(total=steps, initial=step, disable=rank > 0)
    while step < steps:
        sampler.set_epoch(step // len(loader))
        for x, labels in loader:
            loss = F.cross_entropy(model(x.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            step += 1
            bar.update()
            if rank == 0:
                append_row(settings.out / "metrics.csv", {"step": step, "loss": loss.item()})
            if stop.received():
                checkpoints.save(step)
                checkpoints.wait()
                bar.write(f"Stopped after step {step}. The same command continues.")
                return
            if step % settings.save_every == 0:
                checkpoints.save(step)
    checkpoints.wait()
    dense = str(settings.out / "dense")
    writer = HuggingFaceStorageWriter(dense, save_distributed=True, enable_consolidation=True)
    save(exf.fused_state_dict(model), storage_writer=writer)  # ExFusion, for model.state_dict()


if __name__ == "__main__":
    main(tyro.cli(Settings))
    distributed.barrier()  # a rank that leaves early would take its connections along
    distributed.destroy_process_group()
