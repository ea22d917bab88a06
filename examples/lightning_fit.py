"""Lightning: accumulation, an average of the weights, checkpoints, loggers; shipped dense.

    python lightning_fit.py --out runs/lightning
    exfusion plot runs/lightning/logs/version_0

Stop it and run the same command: it continues from its last checkpoint. Needs exfusion_param,
lightning, safetensors, tensorboard, timm and tyro. Copy this file and replace `make_images` with
your data and `build` with your model. A dense script lacks only the lines marked "ExFusion".
"""

import dataclasses
from pathlib import Path
from typing import Any

import lightning
import timm
import torch
import tyro
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import exfusion_param as exf
from exfusion_param.checkpoint import fuse_checkpoint
from exfusion_param.integrations.lightning import ExFusionCallback


@dataclasses.dataclass
class Settings:
    """Train a ViT with Lightning."""

    out: Path = Path("runs/lightning")  # the folder for checkpoints and logs
    num_experts: int = 4  # of each linear
    epochs: int = 4  # passes over the training images
    lr: float = 1e-3  # the highest learning rate
    smoke: bool = False  # a few images, to see that everything works


def make_images(count: int, seed: int) -> TensorDataset:
    """Stand-in for your data: one of ten patterns under noise, (1, 28, 28), and its number."""
    patterns = torch.randn(10, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=draw)
    noise = torch.randn(count, 1, 28, 28, generator=draw)
    return TensorDataset(patterns[labels] + 3 * noise, labels)


def build() -> nn.Module:
    """A small ViT of timm."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=96,
        depth=4, num_heads=4,
    )  # fmt: skip


class Classifier(lightning.LightningModule):
    """A LightningModule as any other; the model is wrapped before its optimizer is made."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.lr = settings.lr
        self.model = build()
        exf.wrap(self.model, num_experts=settings.num_experts)  # ExFusion

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The loss of one micro-batch."""
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """The accuracy, in eval mode."""
        images, labels = batch
        self.log("accuracy", 100 * (self.model(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> Any:
        """AdamW with a cosine, one step of it for each step of the optimizer."""
        groups = exf.param_groups(self, weight_decay=0.05)  # ExFusion, for self.parameters()
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def main(settings: Settings) -> None:
    """Fit, from the last checkpoint on if there is one; fuse that checkpoint; load it dense."""
    lightning.seed_everything(0, verbose=False)
    train = make_images(128 if settings.smoke else 4096, seed=1)
    test = make_images(128 if settings.smoke else 1024, seed=2)
    folder = settings.out / "checkpoints"
    trainer = lightning.Trainer(
        max_epochs=settings.epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        log_every_n_steps=1 if settings.smoke else 10,
        default_root_dir=settings.out,
        logger=[CSVLogger(settings.out, "logs"), TensorBoardLogger(settings.out, "board")],
        callbacks=[
            ExFusionCallback(),  # ExFusion: metrics for the loggers, checkpoints that can be fused
            EMAWeightAveraging(decay=0.99),
            ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True),
        ],
    )
    last = folder / "last.ckpt"
    module, batches = Classifier(settings), DataLoader(train, 64, shuffle=True, drop_last=True)
    tests = DataLoader(test, 500)
    trainer.fit(module, batches, tests, ckpt_path=last if last.exists() else None)
    (result,) = trainer.validate(module, tests, verbose=False)

    dense = settings.out / "model.safetensors"
    dense.unlink(missing_ok=True)
    fuse_checkpoint(last, dense)  # ExFusion: Lightning saves the average as the module's state
    model = build()
    state = load_file(dense)
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    with torch.no_grad():
        logits = torch.cat([model.eval()(images) for images, _ in tests])
    accuracy = 100 * (logits.argmax(1) == test.tensors[1]).float().mean().item()
    print(f"test accuracy: average {result['accuracy']:.1f} %, fused and loaded {accuracy:.1f} %")


if __name__ == "__main__":
    main(tyro.cli(Settings))
