"""Images to train on: Fashion-MNIST in its IDX files, or any ImageFolder."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from support import fashion

Images = Subset[tuple[Tensor, int]]


class Data(NamedTuple):
    """Training and test images, and what a model must know of them."""

    train: Images
    test: Images
    classes: list[str]
    channels: int
    size: int


def load(folder: Path | None, size: int, limit: int | None = None) -> Data:
    """Load a folder of IDX files or an ImageFolder with train/ and test/ (or val/).

    Args:
        folder: the data; None takes the embedded subset of Fashion-MNIST.
        size: pixels that an ImageFolder's images are resized and cropped to.
        limit: take no more than this many training and test images.

    Raises:
        FileNotFoundError: the folder is neither.
    """
    folder = folder or fashion.EMBEDDED
    if fashion.is_in(folder):
        train, test = map(_subset, fashion.load(folder, limit))
        return Data(train, test, fashion.CLASSES, channels=1, size=28)
    if not (folder / "train").is_dir():
        raise FileNotFoundError(
            f"{folder} holds neither train-images-idx3-ubyte[.gz|.xz] nor a folder train/."
        )
    data = _image_folder(folder, size)
    return data._replace(train=_subset(data.train, limit), test=_subset(data.test, limit))


def _subset(images: Any, limit: int | None = None) -> Images:
    return Subset(images, range(min(len(images), limit or len(images))))


def _image_folder(folder: Path, size: int) -> Data:
    transform = transforms.Compose(
        [
            transforms.Resize(size),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    train = ImageFolder(folder / "train", transform)
    tests = [folder / name for name in ("test", "val", "validation") if (folder / name).is_dir()]
    if not tests:
        raise FileNotFoundError(f"{folder} holds train/ but none of test/, val/, validation/.")
    return Data(train, ImageFolder(tests[0], transform), train.classes, channels=3, size=size)
