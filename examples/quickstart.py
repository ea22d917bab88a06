"""Wrap, train and fuse a Transformer with torch alone.

Command: `python examples/quickstart.py --out runs/quickstart`.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import exfusion_param as exf
from support import fashion
from support.log import RunLog

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Classifier(nn.Module):
    """A small ViT: patches of 7 x 7 pixels, a Transformer encoder, the mean of its tokens."""

    def __init__(self, dim: int = 96, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, kernel_size=7, stride=7)
        self.position = nn.Parameter(0.02 * torch.randn(16, dim))
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(dim, len(fashion.CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 1, 28, 28) to logits, shape (batch, classes)."""
        tokens = self.patches(images).flatten(2).mT + self.position  # (batch, 16, dim)
        return self.head(self.encoder(tokens).mean(dim=1))


def train(model: nn.Module, data: TensorDataset, epochs: int, log: RunLog) -> None:
    """A plain loop: nothing in it knows of experts but the line that logs them."""
    optimizer = torch.optim.AdamW(exf.param_groups(model, weight_decay=0.05), lr=1e-3)
    loader = DataLoader(data, batch_size=128, shuffle=True, drop_last=len(data) > 128)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-3, total_steps=epochs * len(loader)
    )
    step = 0
    for epoch in range(epochs):
        for images, labels in loader:
            loss = F.cross_entropy(model(images.to(DEVICE)), labels.to(DEVICE))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            step += 1
            if step % 10 == 0 or step == 1:
                log.row(step, {"loss": loss.item()} | exf.metrics(model))
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")


@torch.no_grad()
def logits_of(model: nn.Module, data: TensorDataset) -> Tensor:
    """In eval mode, shape (images, classes)."""
    model.eval()
    return torch.cat([model(images.to(DEVICE)).cpu() for images, _ in DataLoader(data, 500)])


def main() -> None:
    """Train wrapped, fuse, and check that the dense model is the same function."""
    parser = argparse.ArgumentParser(description="Wrap, train and fuse a small ViT.")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--variant", choices=["sw", "dw", "mb"], default="mb")
    parser.add_argument("--num-experts", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--smoke", action="store_true", help="a few images, for a test")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    train_data, test_data = fashion.load(limit=100 if arguments.smoke else None)
    model = Classifier().to(DEVICE)
    exf.wrap(model, variant=arguments.variant, num_experts=arguments.num_experts)
    print(exf.summarize(model))

    log = RunLog(arguments.out)
    train(model, train_data, arguments.epochs, log)
    log.close()

    trained = logits_of(model, test_data)
    exf.fuse(model)
    fused = logits_of(model, test_data)
    torch.save(model.state_dict(), arguments.out / "model.pt")

    accuracy = (fused.argmax(1) == test_data.tensors[1]).float().mean().item()
    print(f"test accuracy {100 * accuracy:.1f} %")
    print(f"fused and trained logits differ by {(fused - trained).abs().max().item():.1g} at most")
    print(f"exfusion plot {arguments.out}")


if __name__ == "__main__":
    main()
