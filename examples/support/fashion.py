"""Fashion-MNIST from its IDX files, plain or compressed. Needs only torch."""

import gzip
import lzma
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

EMBEDDED = Path(__file__).parents[1] / "data" / "fashion-mnist"
"""A subset that comes with the repository: 12,000 images to train on, 2,000 to test on."""

CLASSES = [
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
]  # fmt: skip

DECOMPRESS = {".gz": gzip.decompress, ".xz": lzma.decompress}


def is_in(folder: Path) -> bool:
    """Whether a folder holds the files."""
    return _file(folder, "train-images-idx3-ubyte") is not None


def load(folder: Path = EMBEDDED, limit: int | None = None) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images, shape (1, 28, 28) with mean 0 and deviation 1, and their labels.

    Args:
        folder: of the files.
        limit: take no more than this many of each.

    Raises:
        FileNotFoundError: a file is not there.
    """
    train, test = (_split(folder, is_train, limit) for is_train in (True, False))
    return train, test


def load_bytes(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Training or test images as they are, shape (n, 1, 28, 28) in uint8, and their labels.

    Raises:
        FileNotFoundError: a file is not there.
    """
    prefix = "train" if train else "t10k"
    images = _read(folder, f"{prefix}-images-idx3-ubyte", header=16).view(-1, 1, 28, 28)
    return images, _read(folder, f"{prefix}-labels-idx1-ubyte", header=8).long()


def _split(folder: Path, train: bool, limit: int | None) -> TensorDataset:
    images, labels = (tensor[:limit] for tensor in load_bytes(folder, train))
    pixels = (images.float() / 255 - 0.286) / 0.353  # mean and deviation of the training set
    return TensorDataset(pixels, labels)


def _read(folder: Path, name: str, header: int) -> Tensor:
    path = _file(folder, name)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no {name}, plain, .gz or .xz.")
    content = path.read_bytes()
    if path.suffix in DECOMPRESS:
        content = DECOMPRESS[path.suffix](content)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header)


def _file(folder: Path, name: str) -> Path | None:
    candidates = (folder / f"{name}{suffix}" for suffix in ("", ".gz", ".xz"))
    return next((path for path in candidates if path.exists()), None)
