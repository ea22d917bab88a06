"""Images to train on: Fashion-MNIST in its IDX files, or any ImageFolder."""

import gzip
import lzma
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

EMBEDDED = Path(__file__).parents[1] / "data" / "fashion-mnist"

DECOMPRESS = {".gz": gzip.decompress, ".xz": lzma.decompress}

Images = Subset[tuple[Tensor, int]]


class Data(NamedTuple):
    """Training and test images, and what a model must know of them."""

    train: Images
    test: Images
    classes: list[str]
    channels: int
    size: int


FASHION_CLASSES = [
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
]


def load(folder: Path | None, size: int, limit: int | None = None) -> Data:
    """Load a folder of IDX files or an ImageFolder with train/ and test/ (or val/).

    Args:
        folder: the data; None takes the embedded subset of Fashion-MNIST.
        size: pixels that an ImageFolder's images are resized and cropped to.
        limit: take no more than this many training and test images.

    Raises:
        FileNotFoundError: the folder is neither.
    """
    folder = folder or EMBEDDED
    if _idx_file(folder, "train-images-idx3-ubyte") is not None:
        data = _fashion_mnist(folder)
    elif (folder / "train").is_dir():
        data = _image_folder(folder, size)
    else:
        raise FileNotFoundError(
            f"{folder} holds neither train-images-idx3-ubyte[.gz|.xz] nor a folder train/."
        )
    return data._replace(train=_first(data.train, limit), test=_first(data.test, limit))


def _first(images: Any, limit: int | None) -> Images:
    return Subset(images, range(min(len(images), limit or len(images))))


def _fashion_mnist(folder: Path) -> Data:
    train, test = (_idx_split(folder, prefix) for prefix in ("train", "t10k"))
    return Data(train, test, FASHION_CLASSES, channels=1, size=28)


def _idx_split(folder: Path, prefix: str) -> Any:
    images = torch.from_numpy(_read_idx(folder, f"{prefix}-images-idx3-ubyte", header=16))
    labels = torch.from_numpy(_read_idx(folder, f"{prefix}-labels-idx1-ubyte", header=8))
    pixels = (images.float() / 255 - 0.286) / 0.353  # mean and deviation of the training set
    return TensorDataset(pixels.view(len(labels), 1, 28, 28), labels.long())


def _read_idx(folder: Path, name: str, header: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    path = _idx_file(folder, name)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no {name}, plain, .gz or .xz.")
    content = path.read_bytes()
    if path.suffix in DECOMPRESS:
        content = DECOMPRESS[path.suffix](content)
    return np.frombuffer(bytearray(content), np.uint8, offset=header)


def _idx_file(folder: Path, name: str) -> Path | None:
    candidates = (folder / f"{name}{suffix}" for suffix in ("", ".gz", ".xz"))
    return next((path for path in candidates if path.exists()), None)


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
