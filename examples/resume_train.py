"""A run that can be killed at any moment: run the same command again, and it continues bit by bit.

    python examples/resume_train.py
    torchrun --nproc-per-node 2 --max-restarts 3 examples/resume_train.py --out runs/resume2

torchdata's StatefulDataLoader takes the order of the data along, wherever in an epoch the run was.
On SIGTERM, which clusters send before they take a machine back, and Ctrl-C it saves and ends.
"""

import dataclasses
from pathlib import Path
from typing import Any

import timm
import torch
import tyro
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
from tqdm import tqdm

import exfusion_param as exf
from exfusion_param.checkpoint import Checkpoints, StopRequest
from exfusion_param.history import append_row
from support import fashion, ranks
from support.sharded_export import export


@dataclasses.dataclass
class Settings:
    """Train a small ViT, and continue it.

    Args:
        out: the folder for checkpoints, metrics.csv and the dense model.
        epochs: passes over the training images.
        batch_size: images of a step on each rank.
        lr: highest learning rate.
        dim: features of a token.
        depth: blocks.
        save_every: steps between checkpoints.
        asynchronous: write checkpoints while the run goes on.
        limit: take no more than this many images; None takes all.
        smoke: a few images, to see that everything works.
    """

    out: Path = Path("runs/resume")
    epochs: int = 4
    batch_size: int = 64
    lr: float = 1e-3
    dim: int = 96
    depth: int = 4
    save_every: int = 50
    asynchronous: bool = True
    limit: int | None = None
    smoke: bool = False


def build(settings: Settings, device: torch.device) -> nn.Module:
    """A wrapped ViT, sharded where there are several ranks."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10}
    model = timm.create_model(
        "vit_tiny_patch16_224",
        **fields,
        embed_dim=settings.dim,
        depth=settings.depth,
        num_heads=4,
        proj_drop_rate=0.1,
    )
    exf.wrap(model, fuse_on="step").to(device)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    return exf.fully_shard(model, mesh=mesh)


def main(settings: Settings, device: torch.device) -> None:
    """Train from the last checkpoint on, and export the dense model."""
    if settings.smoke:
        settings.epochs, settings.limit, settings.save_every = 2, 256, 2
    settings.out.mkdir(parents=True, exist_ok=True)
    images, _ = fashion.load(limit=settings.limit)
    sampler = StatefulDistributedSampler(images, shuffle=True, drop_last=True)
    loader = StatefulDataLoader(
        images,
        settings.batch_size,
        sampler=sampler,
        drop_last=True,
        generator=torch.Generator(),  # else each start of an epoch draws from that of dropout
    )
    model = build(settings, device)
    optimizer = exf.ExpertAdamW(exf.param_groups(model, weight_decay=0.05), lr=settings.lr)
    steps = settings.epochs * len(loader)
    scheduler = OneCycleLR(optimizer, settings.lr, total_steps=steps, cycle_momentum=False)

    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    checkpoints = Checkpoints(settings.out, parts, asynchronous=settings.asynchronous)
    stop = StopRequest()
    step = checkpoints.resume()
    ranks.say(f"Starts at step {step}.")
    if step == 0:
        torch.manual_seed(distributed.get_rank())  # for dropout; a resumed run draws on
    bar = tqdm(total=steps, initial=step, disable=not ranks.is_first())
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
            if ranks.is_first():
                append_row(settings.out / "metrics.csv", {"step": step, "loss": loss.item()})
            if stop.received():
                checkpoints.save(step)
                checkpoints.wait()
                ranks.say(f"Stopped after step {step}. The same command continues.")
                return
            if step % settings.save_every == 0:
                checkpoints.save(step)
    checkpoints.wait()
    export(model, settings.out / "dense")


if __name__ == "__main__":
    with ranks.job() as device:
        main(tyro.cli(Settings), device)
