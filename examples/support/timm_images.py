"""Images with timm's augmentation: Fashion-MNIST, or an ImageFolder such as ImageNet-1k."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import normalize, resize, to_pil_image

from support import fashion

Sample = tuple[Tensor, int]
Transform = Callable[[Image.Image], Tensor]

HELD_OUT = 10  # one of so many images is
TESTS = ("val", "test", "validation")

NORMALIZE: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class FashionImages(Dataset[Sample]):
    """Fashion-MNIST as colour images to train on, augmented one by one.

    Args:
        folder: of the IDX files.
        transform: of each image.
    """

    classes = fashion.CLASSES

    def __init__(self, folder: Path, transform: Transform) -> None:
        self.pixels, self.labels = fashion.load_bytes(folder, train=True)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        image = to_pil_image(self.pixels[index]).convert("RGB")
        return self.transform(image), int(self.labels[index])


class PlainFashionImages(Dataset[Sample]):
    """Fashion-MNIST as colour images without augmentation, a batch at once and many times faster.

    Args:
        folder: of the IDX files.
        train: the training images, or the test images.
        size: pixels.
    """

    classes = fashion.CLASSES

    def __init__(self, folder: Path, train: bool, size: int) -> None:
        self.pixels, self.labels = fashion.load_bytes(folder, train)
        self.size = size

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """Several, as torch's loaders ask for a batch."""
        grey = resize(self.pixels[indices], [self.size, self.size], InterpolationMode.BICUBIC)
        pixels = normalize(grey.expand(-1, 3, -1, -1).float() / 255, **NORMALIZE)
        return list(zip(pixels, self.labels[indices].tolist(), strict=True))


Images: TypeAlias = FashionImages | PlainFashionImages | ImageFolder


def load(
    folder: Path | None,
    size: int,
    augmentation: dict[str, Any] | None,
    held_out: bool = False,
    limit: int | None = None,
) -> tuple[Dataset[Sample], Dataset[Sample], int]:
    """Training and test images, shape (3, size, size), their labels, and how many classes.

    Args:
        folder: Fashion-MNIST's IDX files, or an ImageFolder with train/ and val/; None takes the
            subset of Fashion-MNIST that comes with the repository.
        size: pixels.
        augmentation: of the training images, as timm's create_transform takes it; None leaves them
            as they are.
        held_out: test on one of ten training images, which are not trained on.
        limit: train on no more than this many images, taken at even distances.

    Raises:
        SystemExit: the folder is neither.
    """
    folder = folder or fashion.EMBEDDED
    train = _training(folder, size, augmentation)
    numbers = range(len(train))
    seen = [i for i in numbers if i % HELD_OUT] if held_out else list(numbers)
    count = min(limit or len(seen), len(seen))
    tests: Dataset[Sample] = _plain(folder, held_out, size)
    if held_out:
        tests = Subset(tests, numbers[::HELD_OUT])
    return (
        Subset(train, [seen[i * len(seen) // count] for i in range(count)]),
        tests,
        len(train.classes),
    )


def _training(folder: Path, size: int, augmentation: dict[str, Any] | None) -> Images:
    if augmentation is None and fashion.is_in(folder):
        return PlainFashionImages(folder, True, size)
    more: dict[str, Any] = augmentation or {"no_aug": True}
    augment = create_transform(size, is_training=True, **NORMALIZE, **more)
    if fashion.is_in(folder):
        return FashionImages(folder, augment)
    return ImageFolder(_part(folder, "train"), augment)


def _plain(folder: Path, train: bool, size: int) -> Images:
    if fashion.is_in(folder):
        return PlainFashionImages(folder, train, size)
    plain = create_transform(size, interpolation="bicubic", crop_pct=0.9, **NORMALIZE)
    return ImageFolder(_part(folder, *(("train",) if train else TESTS)), plain)


def _part(folder: Path, *names: str) -> Path:
    found = [folder / name for name in names if (folder / name).is_dir()]
    if not found:
        raise SystemExit(f"{folder} holds neither IDX files nor a folder {' or '.join(names)}.")
    return found[0]
