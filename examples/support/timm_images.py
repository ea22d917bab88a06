"""Images with timm's augmentation: Fashion-MNIST, or an ImageFolder such as ImageNet-1k."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_pil_image

from support import fashion

Sample = tuple[Tensor, int]
Transform = Callable[[Image.Image], Tensor]

HELD_OUT = 10  # one of so many images is

NORMALIZE: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class FashionImages(Dataset[Sample]):
    """Fashion-MNIST as colour images.

    Args:
        folder: of the IDX files.
        train: the training images, or the test images.
        transform: of each image.
    """

    classes = fashion.CLASSES

    def __init__(self, folder: Path, train: bool, transform: Transform) -> None:
        self.pixels, self.labels = fashion.load_bytes(folder, train)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        image = to_pil_image(self.pixels[index]).convert("RGB")
        return self.transform(image), int(self.labels[index])


def load(
    folder: Path | None, size: int, augmentation: dict[str, Any] | None, held_out: bool = False
) -> tuple[Dataset[Sample], Dataset[Sample], int]:
    """Training and test images, shape (3, size, size), their labels, and how many classes.

    Args:
        folder: Fashion-MNIST's IDX files, or an ImageFolder with train/ and val/; None takes the
            subset of Fashion-MNIST that comes with the repository.
        size: pixels.
        augmentation: of the training images, as timm's create_transform takes it; None leaves them
            as they are.
        held_out: test on one of ten training images, which are not trained on.

    Raises:
        SystemExit: the folder is neither.
    """
    folder = folder or fashion.EMBEDDED
    more: dict[str, Any] = NORMALIZE | (augmentation or {"no_aug": True})
    augment = create_transform(size, is_training=True, **more)
    crop = 1.0 if fashion.is_in(folder) else 0.9
    plain = create_transform(size, interpolation="bicubic", crop_pct=crop, **NORMALIZE)
    train = _split(folder, True, augment)
    if not held_out:
        return train, _split(folder, False, plain), len(train.classes)
    numbers = range(len(train))
    seen = Subset(train, [i for i in numbers if i % HELD_OUT])
    unseen = Subset(_split(folder, True, plain), numbers[::HELD_OUT])
    return seen, unseen, len(train.classes)


def _split(folder: Path, train: bool, transform: Transform) -> FashionImages | ImageFolder:
    if fashion.is_in(folder):
        return FashionImages(folder, train, transform)
    names = ("train",) if train else ("val", "test", "validation")
    found = [folder / name for name in names if (folder / name).is_dir()]
    if not found:
        raise SystemExit(f"{folder} holds neither IDX files nor a folder {' or '.join(names)}.")
    return ImageFolder(found[0], transform)
