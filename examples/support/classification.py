"""The models of the ImageNet recipe, what they learn from, and how they are tested and shipped."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from support import ranks
from support.pretraining import Batch

PVT_DEPTHS = {  # arXiv 2102.12122
    "pvt_tiny": [2, 2, 2, 2],
    "pvt_small": [3, 4, 6, 3],
    "pvt_medium": [3, 4, 18, 3],
    "pvt_large": [3, 8, 27, 3],
}


SOURCES: dict[str, dict[str, Any]] = {  # of the models' own recipes
    "pvt_medium": {"drop_path": 0.3, "clip": 1.0},
    "pvt_large": {"drop_path": 0.3, "clip": 1.0},
    "swin_tiny_patch4_window7_224": {"drop_path": 0.2, "clip": 5.0},
    "swin_small_patch4_window7_224": {"drop_path": 0.3, "clip": 5.0},
    "swin_base_patch4_window7_224": {"drop_path": 0.5, "clip": 5.0},
}
OTHERS = {"drop_path": 0.1}  # DeiT's, and those of the two smaller PVTs


def build(
    name: str, size: int, classes: int, more: Mapping[str, Any], drop_path_rate: float = 0.0
) -> nn.Module:
    """A dense model: one of timm, or the first PVT, which timm has not, by transformers.

    Args:
        name: of the model.
        size: pixels of an image.
        classes: to tell apart.
        more: what else the model is made with.
        drop_path_rate: of stochastic depth.
    """
    if name not in PVT_DEPTHS:
        fields: dict[str, Any] = {"num_classes": classes, "drop_path_rate": drop_path_rate, **more}
        return timm.create_model(name, **fields if "pvt" in name else fields | {"img_size": size})
    from transformers import PvtConfig, PvtForImageClassification  # takes seconds

    config = PvtConfig(
        image_size=size,
        depths=PVT_DEPTHS[name],
        num_labels=classes,
        drop_path_rate=drop_path_rate,
        **more,
    )
    return PvtForImageClassification(config)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Shape (batch, classes), of a model of timm or transformers."""
    output = model(images)
    return output if isinstance(output, Tensor) else output.logits


class Mixing:
    """The loss of a batch, which is mixed first by Mixup and CutMix.

    Args:
        classes: to tell apart.
        augment: False leaves the images and their labels as they are.
    """

    def __init__(self, classes: int, augment: bool) -> None:
        arguments = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1}
        self.mixup = Mixup(num_classes=classes, **arguments) if augment else None
        self.soft = SoftTargetCrossEntropy()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over the batch."""
        images, labels = batch
        if self.mixup is None:
            return F.cross_entropy(logits_of(model, images), labels)
        images, targets = self.mixup(images, labels)
        return self.soft(logits_of(model, images), targets)


class Accuracy:
    """Top-1 accuracy in percent, and cross-entropy, on test images that the ranks share.

    Args:
        images: to test on, with their labels.
        batch_size: images at once.
        workers: processes that load.
    """

    def __init__(self, images: Dataset[Any], batch_size: int, workers: int) -> None:
        self.loader = DataLoader(ranks.mine(images), batch_size, num_workers=workers)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """`accuracy` and `test_loss`."""
        device = next(model.parameters()).device
        sums = torch.zeros(3, device=device)
        for images, labels in self.loader:
            logits, labels = logits_of(model, images.to(device)).float(), labels.to(device)
            hits = (logits.argmax(1) == labels).sum()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([hits, loss, torch.tensor(len(labels), device=device)])
        distributed.all_reduce(sums)
        hits, loss, count = sums.tolist()
        return {"accuracy": 100 * hits / count, "test_loss": loss / count}


@torch.no_grad()
def check_dense(
    folder: Path,
    shipped: nn.Module,
    make: Callable[[], nn.Module],
    evaluate: Callable[[nn.Module], dict[str, float]],
) -> str:
    """Load a shipped model strictly into a fresh dense one, and test that.

    Args:
        folder: with `model.safetensors`.
        shipped: what it was written from.
        make: a dense model.
        evaluate: tests a model; called by all ranks together.

    Returns:
        What was found, in a sentence.
    """
    path, fresh = folder / "model.safetensors", make()
    if set(fresh.state_dict()) != set(shipped.state_dict()):
        return f"{path} holds the mixture, which no dense model loads."
    fresh.load_state_dict(load_file(path), strict=True)
    found = evaluate(fresh.to(next(shipped.parameters()).device).eval())
    return f"shipped and loaded: {json.dumps(found)}"
