"""Wrap, train and fuse a Transformer in a plain torch loop.

    python quickstart.py --out runs/quickstart
    exfusion plot runs/quickstart

Needs exfusion_param and torch. Copy this file and replace `make_images` with your data and
`Classifier` with your model. A dense script lacks only the lines marked "ExFusion".
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import exfusion_param as exf
from exfusion_param.history import append_row

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_images(count: int, seed: int) -> TensorDataset:
    """Stand-in for your data: one of ten patterns under noise, (1, 28, 28), and its number."""
    patterns = torch.randn(10, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=draw)
    noise = torch.randn(count, 1, 28, 28, generator=draw)
    return TensorDataset(patterns[labels] + 3 * noise, labels)


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
        self.head = nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 1, 28, 28) to logits, shape (batch, classes)."""
        tokens = self.patches(images).flatten(2).mT + self.position  # (batch, 16, dim)
        return self.head(self.encoder(tokens).mean(dim=1))


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
    args = parser.parse_args()

    torch.manual_seed(0)
    train_data = make_images(100 if args.smoke else 4096, seed=1)
    test_data = make_images(100 if args.smoke else 1024, seed=2)
    model = Classifier().to(DEVICE)
    exf.wrap(model, variant=args.variant, num_experts=args.num_experts)  # ExFusion
    print(exf.summarize(model))  # ExFusion

    groups = exf.param_groups(model, weight_decay=0.05)  # ExFusion, for model.parameters()
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    loader = DataLoader(train_data, batch_size=50, shuffle=True)
    steps = args.epochs * len(loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "metrics.csv"
    log.unlink(missing_ok=True)
    step = 0
    for epoch in range(args.epochs):
        for images, labels in loader:
            loss = F.cross_entropy(model(images.to(DEVICE)), labels.to(DEVICE))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            step += 1
            if step % 10 == 0 or step == 1:
                row = {"step": step, "loss": loss.item()}
                row |= exf.metrics(model)  # ExFusion
                append_row(log, row)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    trained = logits_of(model, test_data)
    exf.fuse(model)  # ExFusion: the dense model again
    fused = logits_of(model, test_data)
    torch.save(model.state_dict(), args.out / "model.pt")

    accuracy = (fused.argmax(1) == test_data.tensors[1]).float().mean().item()
    print(f"test accuracy {100 * accuracy:.1f} %")
    print(f"fused and trained logits differ by {(fused - trained).abs().max().item():.1g} at most")
    print(f"exfusion plot {args.out}")


if __name__ == "__main__":
    main()
