"""Scenes of garments of Fashion-MNIST, with their boxes, masks and classes."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from support import fashion

CLASSES = 1 + len(fashion.CLASSES)  # 0 is the background
INK = 64  # of 255: brighter pixels belong to a garment
IGNORED = 255


class Scene(NamedTuple):
    """One image and what is in it.

    Args:
        image: shape (3, size, size), in [0, 1].
        boxes: shape (n, 4): left, top, right, bottom.
        labels: shape (n,), from 1.
        masks: shape (n, size, size), of what is seen of each garment.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor


class Scenes(Dataset[Any]):
    """Scenes, each drawn from its number, so that they are the same in each epoch.

    Args:
        folder: of Fashion-MNIST's IDX files; None takes the embedded subset.
        train: of the training images, or of the test images.
        count: scenes.
        size: pixels.
    """

    def __init__(self, folder: Path | None, train: bool, count: int, size: int) -> None:
        self.images, self.labels = fashion.load_bytes(folder or fashion.EMBEDDED, train)
        self.train, self.count, self.size = train, count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.scene(index)

    def scene(self, index: int) -> Scene:
        """One to four garments on a grey canvas, later ones in front of earlier ones."""
        generator = torch.Generator().manual_seed(2 * index + self.train)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high, (1,), generator=generator))

        canvas = 0.1 * torch.rand(self.size, self.size, generator=generator)
        owner = torch.full((self.size, self.size), -1)
        labels = []
        for number in range(draw(1, 5)):
            chosen, side = draw(0, len(self.images)), draw(self.size // 4, self.size // 2)
            garment = F.interpolate(self.images[chosen][None].float(), side, mode="bilinear")[0, 0]
            top, left = draw(0, self.size - side), draw(0, self.size - side)
            place = (slice(top, top + side), slice(left, left + side))
            seen = garment > INK
            canvas[place] = torch.where(seen, garment / 255, canvas[place])
            owner[place] = torch.where(seen, number, owner[place])
            labels.append(int(self.labels[chosen]) + 1)
        masks = torch.stack([owner == number for number in range(len(labels))])
        visible = masks.sum(dim=(1, 2)) > self.size // 4
        masks = masks[visible]
        boxes = torch.stack([_box(mask) for mask in masks]) if len(masks) else torch.zeros(0, 4)
        kept = torch.tensor(labels)[visible]
        return Scene(canvas.expand(3, -1, -1).clone(), boxes, kept, masks)


def _box(mask: Tensor) -> Tensor:
    rows, columns = (mask.any(dim=d).nonzero().flatten() for d in (1, 0))
    edges = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    return torch.stack(edges).float()


class LabelledPixels(Scenes):
    """Scenes for segmentation: an image and the class of each of its pixels."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        scene = self.scene(index)
        pixels = torch.zeros(self.size, self.size, dtype=torch.long)
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            pixels[mask] = label
        return scene.image, pixels


class LabelledBoxes(Scenes):
    """Scenes for detection, as torchvision's models take them: an image and its targets."""

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        scene = self.scene(index)
        masks = scene.masks.to(torch.uint8)
        return scene.image, {"boxes": scene.boxes, "labels": scene.labels, "masks": masks}
