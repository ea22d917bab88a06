"""accelerate: prepare, accumulate, trackers, save_state and load_state; shipped dense.

    accelerate launch accelerate_train.py --out runs/accelerate
    exfusion plot runs/accelerate
    exfusion fuse runs/accelerate/state runs/accelerate-dense

Stop it and run the same command: it continues after the last epoch that it finished. Needs
exfusion_param, accelerate, tensorboard, tqdm and tyro. Copy this file and replace `make_images`
with your data and `build` with your model. A dense script lacks only the lines marked "ExFusion".
"""

import dataclasses
from pathlib import Path

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import exfusion_param as exf
from exfusion_param.checkpoint import save_config
from exfusion_param.history import append_row, drop_rows_after


@dataclasses.dataclass
class Settings:
    """Train a small Transformer with accelerate."""

    out: Path = Path("runs/accelerate")  # the folder for the state and the logs
    num_experts: int = 4  # of each linear
    mixed_precision: str = "no"  # or fp16, bf16
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
    """A small Transformer over the 28 rows of an image."""
    layer = nn.TransformerEncoderLayer(
        96, 4, 384, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    head = (nn.Flatten(), nn.Linear(28 * 96, 10))
    return nn.Sequential(nn.Flatten(1, 2), nn.Linear(28, 96), encoder, *head)


class Progress:
    """How many epochs are done; accelerate saves it with the rest."""

    epochs = 0

    def state_dict(self) -> dict[str, int]:
        """Plain values."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue."""
        self.epochs = state["epochs"]


def main(settings: Settings) -> None:
    """Train, from the saved state on if there is one; fuse; save the dense model."""
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision, gradient_accumulation_steps=2,
        log_with="tensorboard", project_dir=settings.out,
    )  # fmt: skip
    accelerator.init_trackers("board")
    set_seed(0)
    train = make_images(128 if settings.smoke else 4096, seed=1)
    test = make_images(128 if settings.smoke else 1024, seed=2)
    model = build()
    exf.wrap(model, num_experts=settings.num_experts)  # ExFusion, before prepare
    groups = exf.param_groups(model, weight_decay=0.05)  # ExFusion, for model.parameters()
    optimizer = torch.optim.AdamW(groups, lr=settings.lr)
    loader = DataLoader(train, 64, shuffle=True, drop_last=True)
    steps = settings.epochs * len(loader) // 2
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    unwrapped = accelerator.unwrap_model(model)  # of DDP; its experts stay
    progress, state, log = Progress(), settings.out / "state", settings.out / "metrics.csv"
    accelerator.register_for_checkpointing(progress)
    if state.is_dir():
        accelerator.load_state(str(state))
    if accelerator.is_main_process and log.exists():
        drop_rows_after(log, progress.epochs * len(loader) or -1)
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
            if accelerator.is_main_process and (batch % 20 == 0 or settings.smoke):
                row = {"loss": loss.item()}
                row |= exf.metrics(unwrapped)  # ExFusion
                accelerator.log(row, step=batch)
                append_row(log, {"step": batch} | row)
        progress.epochs = epoch + 1
        accelerator.save_state(str(state))
        if accelerator.is_main_process:
            save_config(unwrapped, state)  # ExFusion, for `exfusion fuse`

    dense = exf.fuse(unwrapped).eval()  # ExFusion: the dense model again
    with torch.no_grad():
        images, labels = (tensor.to(accelerator.device) for tensor in test.tensors)
        accuracy = 100 * (dense(images).argmax(1) == labels).float().mean().item()
    accelerator.save_model(dense, str(settings.out / "dense"))
    accelerator.end_training()
    accelerator.print(f"test accuracy of the fused model {accuracy:.1f} %")


if __name__ == "__main__":
    main(tyro.cli(Settings))
