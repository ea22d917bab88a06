"""accelerate: prepare, accumulate, trackers, save_state and load_state; shipped dense.

    python examples/accelerate_train.py --out runs/accelerate
    exfusion fuse runs/accelerate/state runs/accelerate-dense

Stop it and run the same command: it continues after the last epoch that it finished.
"""

import dataclasses
from pathlib import Path

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import exfusion_param as exf
from exfusion_param.checkpoint import save_config
from support import fashion
from support.log import RunLog


@dataclasses.dataclass
class Settings:
    """Train a ViT with accelerate on a subset of Fashion-MNIST.

    Args:
        out: the folder for the state and the logs.
        num_experts: experts of each linear.
        mixed_precision: no, fp16 or bf16.
        epochs: passes over the training images.
        lr: highest learning rate.
        smoke: a few images, to see that everything works.
    """

    out: Path = Path("runs/accelerate")
    num_experts: int = 4
    mixed_precision: str = "no"
    epochs: int = 4
    lr: float = 1e-3
    smoke: bool = False


def build() -> nn.Module:
    """A small Transformer over the 28 rows of an image."""
    layer = nn.TransformerEncoderLayer(
        96, 4, 384, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.Sequential(
        nn.Flatten(1, 2),
        nn.Linear(28, 96),
        nn.TransformerEncoder(layer, 4, enable_nested_tensor=False),
        nn.Flatten(),
        nn.Linear(28 * 96, len(fashion.CLASSES)),
    )


class Progress:
    """How many epochs are done; accelerate saves it with the rest."""

    def __init__(self) -> None:
        self.epochs = 0

    def state_dict(self) -> dict[str, int]:
        """Plain values."""
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue."""
        vars(self).update(state)


def main(settings: Settings) -> None:
    """Train, from the saved state on if there is one; fuse; save the dense model."""
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision, gradient_accumulation_steps=2
    )
    set_seed(0)
    train, test = fashion.load(limit=128 if settings.smoke else None)
    model: nn.Module = exf.wrap(build(), num_experts=settings.num_experts)  # before prepare
    optimizer = torch.optim.AdamW(exf.param_groups(model, weight_decay=0.05), lr=settings.lr)
    loader = DataLoader(train, 64, shuffle=True, drop_last=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, settings.epochs * len(loader) // 2
    )
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    progress, state = Progress(), settings.out / "state"
    accelerator.register_for_checkpointing(progress)
    if state.is_dir():
        accelerator.load_state(str(state))
    done = progress.epochs * len(loader)
    log = RunLog(settings.out, after=done) if accelerator.is_main_process else None
    for epoch in range(progress.epochs, settings.epochs):
        model.train()
        for index, (images, labels) in enumerate(tqdm(loader, leave=False)):
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            batch = epoch * len(loader) + index + 1
            if log and (batch % 20 == 0 or settings.smoke):
                values = {"loss": loss.item()} | exf.metrics(accelerator.unwrap_model(model))
                log.row(batch, values)
        progress.epochs = epoch + 1
        accelerator.save_state(str(state))
        if accelerator.is_main_process:  # for `exfusion fuse`
            save_config(accelerator.unwrap_model(model), state)

    if log:
        log.close()
    dense = exf.fuse(accelerator.unwrap_model(model)).eval()
    with torch.no_grad():
        images, labels = (tensor.to(accelerator.device) for tensor in test.tensors)
        accuracy = 100 * (dense(images).argmax(1) == labels).float().mean().item()
    accelerator.save_model(dense, str(settings.out / "dense"))
    accelerator.print(f"test accuracy of the fused model {accuracy:.1f} %")


if __name__ == "__main__":
    main(tyro.cli(Settings))
