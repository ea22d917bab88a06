"""timm's model, optimizer, scheduler and average of the weights; the average is fused and shipped.

Command: `python examples/timm_ema.py --model deit_tiny_patch16_224 --out runs/timm`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import timm
import torch
import tyro
from safetensors.torch import load_file, save_file
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import exfusion_param as exf
from support import data
from support.log import RunLog

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclasses.dataclass
class Settings:
    """Train a model of timm with experts and an average of its weights.

    Args:
        model: a ViT of timm.
        opt: any optimizer of timm.
        data: Fashion-MNIST's IDX files or an ImageFolder; by default a subset of Fashion-MNIST.
        image_size: pixels that the images of an ImageFolder are resized to.
        patch_size: pixels of a patch.
        out: the folder for the model and the logs.
        num_experts: experts of each linear.
        epochs: passes over the training images.
        batch_size: images in a batch.
        lr: highest learning rate.
        fusion_lr: learning rate of the routers; None takes lr.
        ema_decay: of the average.
        smoke: a few images, to see that everything works.
    """

    model: str = "vit_tiny_patch16_224"
    opt: str = "adamw"
    data: Path | None = None
    image_size: int = 28
    patch_size: int = 7
    out: Path = Path("runs/timm")
    num_experts: int = 4
    epochs: int = 4
    batch_size: int = 128
    lr: float = 1e-3
    fusion_lr: float | None = None
    ema_decay: float = 0.99
    smoke: bool = False


@torch.no_grad()
def accuracy(model: nn.Module, images: data.Images) -> float:
    """Share of the images that are classified rightly, in percent."""
    model.eval()
    right = [(model(x.to(DEVICE)).argmax(1).cpu() == y).float() for x, y in DataLoader(images, 200)]
    return 100 * torch.cat(right).mean().item()


def train(model: nn.Module, images: data.Images, settings: Settings) -> nn.Module:
    """Train; the average of the weights, a wrapped model too."""
    loader = DataLoader(images, settings.batch_size, shuffle=True, drop_last=not settings.smoke)
    optimizer = create_optimizer_v2(
        model,
        opt=settings.opt,
        lr=settings.lr,
        param_group_fn=lambda model: exf.param_groups(model, 0.05, fusion_lr=settings.fusion_lr),
    )
    steps = settings.epochs * len(loader)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=steps // 10, warmup_lr_init=1e-6, t_in_epochs=False
    )
    average = ModelEmaV3(model, decay=settings.ema_decay, use_warmup=True)
    log = RunLog(settings.out)
    step = 0
    for epoch in range(settings.epochs):
        model.train()
        for x, y in tqdm(loader, desc=f"epoch {epoch + 1}", leave=False):
            loss = F.cross_entropy(model(x.to(DEVICE)), y.to(DEVICE))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            scheduler.step_update(step)
            average.update(model, step=step)
            if step % 10 == 0 or step == 1:
                log.row(step, {"loss": loss.item()} | exf.metrics(model))
    log.close()
    return average.module


def main(settings: Settings) -> None:
    """Train, fuse the average, save it, and load it into a fresh model of timm."""
    torch.manual_seed(0)
    images = data.load(settings.data, settings.image_size, limit=60 if settings.smoke else None)
    arguments: dict[str, Any] = {
        "model_name": settings.model,
        "img_size": images.size,
        "patch_size": settings.patch_size,
        "in_chans": images.channels,
        "num_classes": len(images.classes),
    }
    model = timm.create_model(**arguments).to(DEVICE)
    exf.wrap(model, num_experts=settings.num_experts)
    average = train(model, images.train, settings)
    trained, averaged = accuracy(model, images.test), accuracy(average, images.test)

    exf.fuse(average)  # the model could train on
    save_file(average.state_dict(), settings.out / "model.safetensors")
    (settings.out / "config.json").write_text(json.dumps(arguments, indent=2) + "\n")
    fresh = timm.create_model(**arguments).to(DEVICE)
    fresh.load_state_dict(load_file(settings.out / "model.safetensors"), strict=True)
    print(
        f"test accuracy: trained {trained:.1f} %, average {averaged:.1f} %, "
        f"average fused and loaded {accuracy(fresh, images.test):.1f} %"
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
