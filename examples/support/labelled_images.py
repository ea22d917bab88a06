"""ADE20K and COCO from their folders, or scenes of garments, for segmentation and detection."""

from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets, tv_tensors
from torchvision.transforms import v2

from support import scenes

ADE_CLASSES = 150
COCO_CLASSES = 91  # with the background, and numbers that no class has

Labelled = tuple[Dataset[Any], Dataset[Any], int]
"""To train on, to test on, and how many classes there are."""


class Ade20k(Dataset[tuple[Tensor, Tensor]]):
    """ADE20K's scene parsing: images/SPLIT/*.jpg and annotations/SPLIT/*.png.

    Args:
        folder: of the two.
        split: training or validation.
        size: pixels of the crops to train on, and of the squares to test on.
    """

    def __init__(self, folder: Path, split: str, size: int) -> None:
        self.images = sorted((folder / "images" / split).glob("*.jpg"))
        self.folder = folder / "annotations" / split
        if not self.images:
            raise SystemExit(f"{folder} holds no images/{split}/*.jpg.")
        augment = [
            v2.RandomResizedCrop(size, scale=(0.25, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.4),
        ]
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                *(augment if split == "training" else [v2.Resize((size, size), antialias=True)]),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self.images[index]
        image = Image.open(path).convert("RGB")
        marks = v2.functional.pil_to_tensor(Image.open(self.folder / f"{path.stem}.png"))
        image, marks = self.transform(image, tv_tensors.Mask(marks))
        classes = marks.as_subclass(Tensor)[0].long() - 1  # 0 marks pixels of no class
        return image.as_subclass(Tensor), classes.where(classes >= 0, scenes.IGNORED)


def for_segmentation(folder: Path | None, size: int, count: int) -> Labelled:
    """ADE20K, or scenes of garments.

    Args:
        folder: of ADE20K, or of Fashion-MNIST's IDX files; None takes the embedded subset.
        size: pixels.
        count: how many scenes.
    """
    if folder is not None and (folder / "annotations").is_dir():
        parts = (Ade20k(folder, split, size) for split in ("training", "validation"))
        return (*parts, ADE_CLASSES)  # type: ignore[return-value]
    train, test = (
        scenes.LabelledPixels(folder, is_train, size=size, count=count if is_train else count // 5)
        for is_train in (True, False)
    )
    return train, test, scenes.CLASSES


def for_detection(folder: Path | None, size: int, count: int) -> Labelled:
    """COCO 2017, or scenes of garments.

    Args:
        folder: of COCO's train2017/, val2017/ and annotations/, or of Fashion-MNIST's IDX files;
            None takes the embedded subset.
        size: pixels of scenes.
        count: how many scenes.
    """
    if folder is not None and (folder / "annotations").is_dir():
        return _coco(folder, "train"), _coco(folder, "val"), COCO_CLASSES
    train, test = (
        scenes.LabelledBoxes(folder, is_train, size=size, count=count if is_train else count // 5)
        for is_train in (True, False)
    )
    return train, test, scenes.CLASSES


def _coco(folder: Path, split: Literal["train", "val"]) -> Dataset[Any]:
    flip = [v2.RandomHorizontalFlip()] if split == "train" else []
    transform = v2.Compose(
        [v2.ToImage(), *flip, v2.ToDtype(torch.float32, scale=True), v2.SanitizeBoundingBoxes()]
    )
    coco = datasets.CocoDetection(
        str(folder / f"{split}2017"),
        str(folder / "annotations" / f"instances_{split}2017.json"),
        transforms=transform,
    )
    if split == "train":  # images without objects teach torchvision's detectors nothing
        coco.ids = [i for i in coco.ids if coco.coco.getAnnIds(imgIds=i, iscrowd=False)]
    return datasets.wrap_dataset_for_transforms_v2(coco, target_keys=("boxes", "labels", "masks"))
