"""FSDP2: a ViT with experts on any number of GPUs or CPUs, of any size.

    torchrun --nproc-per-node 2 examples/fsdp_train.py --out runs/fsdp

On several nodes, the same on each, with --out in a folder that all of them share:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
        examples/fsdp_train.py --dim 4096 --depth 32 --heads 32 --bf16 --checkpointing --compile
        --replicas 2 --no-check --out SHARED/fsdp

Stop it and run the same command, on any number of ranks: it continues after the last checkpoint.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import tyro
from timm.models.vision_transformer import VisionTransformer
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset

import exfusion_param as exf
from exfusion_param.checkpoint import Checkpoints
from support import fashion, ranks
from support.sharded_export import check, export
from support.sharded_init import init
from support.sharded_log import SharedLog


@dataclasses.dataclass
class Settings:
    """Train a ViT under FSDP2 on a subset of Fashion-MNIST.

    Args:
        out: the folder for checkpoints, logs and the dense model.
        dim: features of a token.
        depth: blocks.
        heads: attention heads of a block.
        image_size: pixels that the images are resized to.
        patch_size: pixels of a patch.
        num_experts: experts of each linear.
        batch_size: images of a step, on all ranks together.
        steps: to train in all; more of them continue a run that has ended.
        lr: highest learning rate.
        warmup: steps up to it; then it falls with the square root of the step.
        replicas: of the sharded model (HSDP), such as one for each node.
        bf16: compute in bfloat16; weights, experts and sums over ranks stay in float32.
        checkpointing: compute activations anew in backward instead of keeping them.
        compile: each block.
        save_every: steps between checkpoints.
        log_every: steps between rows of metrics.csv.
        check: load the dense model on rank 0, which has to hold it, and test it.
        smoke: a few images and steps, to see that everything works.
    """

    out: Path = Path("runs/fsdp")
    dim: int = 192
    depth: int = 6
    heads: int = 3
    image_size: int = 28
    patch_size: int = 7
    num_experts: int = 4
    batch_size: int = 128
    steps: int = 400
    lr: float = 1e-3
    warmup: int = 40
    replicas: int = 1
    bf16: bool = False
    checkpointing: bool = False
    compile: bool = False
    save_every: int = 100
    log_every: int = 10
    check: bool = True
    smoke: bool = False


def build(settings: Settings) -> Any:
    """The dense model, without biases of queries and keys, as ViT-22B; it resizes images."""
    size, patch, classes = settings.image_size, settings.patch_size, len(fashion.CLASSES)
    dims: dict[str, Any] = {"embed_dim": settings.dim, "num_heads": settings.heads}
    model = VisionTransformer(size, patch, 1, classes, depth=settings.depth, qkv_bias=False, **dims)
    model.register_forward_pre_hook(lambda model, args: F.interpolate(args[0], size))
    return model


def build_sharded(settings: Settings, device: torch.device) -> Any:
    """The wrapped model, of which each rank makes its own part alone."""
    with torch.device("meta"):
        model = exf.wrap(build(settings), num_experts=settings.num_experts, fuse_on="step", seed=0)
    ranks.say(exf.summarize(model))
    model.set_grad_checkpointing(settings.checkpointing)
    shape = (settings.replicas, distributed.get_world_size() // settings.replicas)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(torch.bfloat16 if settings.bf16 else None, torch.float32)
    exf.fully_shard(model, mesh=mesh if settings.replicas > 1 else mesh["shard"], mp_policy=policy)
    init(model.to_empty(device=device), seed=0)
    if settings.compile:
        for block in model.blocks:
            block.compile()
    return model


def train(model: Any, images: TensorDataset, settings: Settings, device: torch.device) -> None:
    """Train, after the last checkpoint if there is one."""
    optimizer = exf.ExpertAdamW(exf.param_groups(model, weight_decay=0.05), lr=settings.lr)
    rise = settings.warmup
    scheduler = LambdaLR(optimizer, lambda step: min((step + 1) / rise, (rise / (step + 1)) ** 0.5))
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    checkpoints = Checkpoints(settings.out / "checkpoints", parts, keep=1)
    step = checkpoints.resume()
    log = SharedLog(settings.out, settings.batch_size, step, settings.steps)
    for x, y in log.progress(ranks.my_batches(images, settings.batch_size, log.steps, device)):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        step += 1
        if step % settings.log_every == 0 or step == settings.steps:  # on all ranks together
            row = {"loss": ranks.mean(loss), "gradient_norm": norm.full_tensor().item()}
            log.row(step, row | exf.metrics(model))
        if step % settings.save_every == 0 or step == settings.steps:
            checkpoints.save(step)
    log.close()


def main(settings: Settings, device: torch.device) -> None:
    """Train, export the dense model, and test it."""
    if settings.smoke:
        settings.batch_size, settings.steps = 16, min(settings.steps, 6)
    images, test = fashion.load(limit=64 if settings.smoke else None)
    model = build_sharded(settings, device)
    train(model, images, settings, device)
    path = export(model, settings.out / "dense")
    ranks.say(f"{path}, peak memory of a rank {ranks.peak_memory(device):.2f} GiB")
    if settings.check:
        check(path, lambda: build(settings), model, test)


if __name__ == "__main__":
    with ranks.job() as device:
        main(tyro.cli(Settings), device)
