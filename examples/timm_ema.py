"""timm's model, optimizer, scheduler and average of the weights; the average is fused and shipped.

    python timm_ema.py --model deit_tiny_patch16_224 --out runs/timm
    exfusion plot runs/timm

Needs exfusion_param, safetensors, timm, tqdm and tyro. Copy this file and replace `make_images`
with your data and MODEL with your model. A dense script lacks only the lines marked "ExFusion".
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
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import exfusion_param as exf
from exfusion_param.history import append_row

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODEL: dict[str, Any] = {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10}


@dataclasses.dataclass
class Settings:
    """Train a model of timm with experts and an average of its weights."""

    model: str = "vit_tiny_patch16_224"  # a ViT of timm
    opt: str = "adamw"  # any optimizer of timm
    out: Path = Path("runs/timm")  # the folder for the model and the log
    num_experts: int = 4  # of each linear
    epochs: int = 4  # passes over the training images
    batch_size: int = 64  # images in a batch
    lr: float = 1e-3  # the highest learning rate
    fusion_lr: float | None = None  # of the routers; None takes lr
    ema_decay: float = 0.99  # of the average
    smoke: bool = False  # a few images, to see that everything works


def make_images(count: int, seed: int) -> TensorDataset:
    """Stand-in for your data: one of ten patterns under noise, (1, 28, 28), and its number."""
    patterns = torch.randn(10, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=draw)
    noise = torch.randn(count, 1, 28, 28, generator=draw)
    return TensorDataset(patterns[labels] + 3 * noise, labels)


@torch.no_grad()
def accuracy(model: nn.Module, images: TensorDataset) -> float:
    """Share of the images that are classified rightly, in percent."""
    model.eval()
    right = [(model(x.to(DEVICE)).argmax(1).cpu() == y).float() for x, y in DataLoader(images, 200)]
    return 100 * torch.cat(right).mean().item()


def train(model: nn.Module, images: TensorDataset, settings: Settings) -> nn.Module:
    """Train; the average of the weights, a wrapped model too."""
    loader = DataLoader(images, settings.batch_size, shuffle=True)
    optimizer = create_optimizer_v2(
        model,
        opt=settings.opt,
        lr=settings.lr,
        param_group_fn=lambda model: exf.param_groups(  # ExFusion, for weight_decay=0.05
            model, 0.05, fusion_lr=settings.fusion_lr
        ),
    )
    steps = settings.epochs * len(loader)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=steps // 10, warmup_lr_init=1e-6, t_in_epochs=False
    )
    average = ModelEmaV3(model, decay=settings.ema_decay, use_warmup=True)
    log = settings.out / "metrics.csv"
    log.unlink(missing_ok=True)
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
                row = {"step": step, "loss": loss.item()}
                row |= exf.metrics(model)  # ExFusion
                append_row(log, row)
    return average.module


def main(settings: Settings) -> None:
    """Train, fuse the average, save it, and load it into a fresh model of timm."""
    torch.manual_seed(0)
    settings.out.mkdir(parents=True, exist_ok=True)
    images = make_images(60 if settings.smoke else 4096, seed=1)
    test = make_images(60 if settings.smoke else 1024, seed=2)
    model = timm.create_model(settings.model, **MODEL).to(DEVICE)
    exf.wrap(model, num_experts=settings.num_experts)  # ExFusion
    average = train(model, images, settings)
    trained, averaged = accuracy(model, test), accuracy(average, test)

    exf.fuse(average)  # ExFusion: the average becomes dense; the model could train on
    save_file(average.state_dict(), settings.out / "model.safetensors")
    arguments = {"model_name": settings.model} | MODEL
    (settings.out / "config.json").write_text(json.dumps(arguments, indent=2) + "\n")
    fresh = timm.create_model(**arguments).to(DEVICE)
    fresh.load_state_dict(load_file(settings.out / "model.safetensors"), strict=True)
    print(
        f"test accuracy: trained {trained:.1f} %, average {averaged:.1f} %, "
        f"average fused and loaded {accuracy(fresh, test):.1f} %"
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
