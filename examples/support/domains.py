"""Domains that one run learns together: images seen in several ways, or kinds of text."""

import lzma
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support import corpus, fashion
from support.classification import build

Pair = tuple[Tensor, Tensor]


class Domain(NamedTuple):
    """What one specialist is for: inputs and targets to train on, and others to test on."""

    name: str
    train: Pair
    test: Pair


class Kind(NamedTuple):
    """What the domains are of.

    Args:
        build: makes the dense model.
        load: the domains; with True tested on what others train on, to choose settings.
        score: of a model in eval mode on inputs and targets; `better` says which way.
        metric: with its unit.
        better: more or less.
    """

    build: Callable[[], nn.Module]
    load: Callable[[bool], list[Domain]]
    score: Callable[[nn.Module, Pair], float]
    metric: str
    better: str


# Fashion-MNIST

TURNED: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda x: x,
    "inverted": lambda x: x.mean() - x,
    "turned": lambda x: x.rot90(1, (-2, -1)),
    "scrambled": lambda x: _parts(x)[:, :, [5, 2, 7, 0, 3, 6, 1, 4]].flatten(-2).view_as(x),
}
GROUPS = {"tops": (0, 2, 4, 6), "shoes": (5, 7, 9), "others": (1, 3, 8)}
TUNING = 2000  # training images that choices are tested on


def _parts(x: Tensor) -> Tensor:
    """Images of 28 x 28 as 8 bands of 98 pixels."""
    return x.view(len(x), 1, 8, 98)


def corruptions(tuning: bool) -> list[Domain]:
    """The same garments seen in four ways."""
    train, test = _images(tuning)
    return [
        Domain(name, (change(train[0]), train[1]), (change(test[0]), test[1]))
        for name, change in TURNED.items()
    ]


def classes(tuning: bool) -> list[Domain]:
    """Three groups of garments, told apart by one head."""

    def part(pair: Pair, group: tuple[int, ...]) -> Pair:
        is_in = torch.isin(pair[1], torch.tensor(group))
        return pair[0][is_in], pair[1][is_in]

    train, test = _images(tuning)
    return [Domain(name, part(train, group), part(test, group)) for name, group in GROUPS.items()]


def _images(tuning: bool) -> tuple[Pair, Pair]:
    (x, y), (x_test, y_test) = (data.tensors for data in fashion.load())
    if tuning:
        return (x[:-TUNING], y[:-TUNING]), (x[-TUNING:], y[-TUNING:])
    return (x, y), (x_test, y_test)


def vit() -> nn.Module:
    """Of two blocks."""
    sizes = {"patch_size": 7, "embed_dim": 64, "depth": 2, "num_heads": 4, "in_chans": 1}
    return build("deit_tiny_patch16_224", 28, len(fashion.CLASSES), sizes)


@torch.no_grad()
def accuracy(model: nn.Module, pair: Pair) -> float:
    """In percent."""
    return 100 * (model(pair[0]).argmax(1) == pair[1]).double().mean().item()


# Text

BYTES, WINDOW = 256, 64
TEXTS = {
    "Shakespeare": (corpus.EMBEDDED, "*.txt.xz"),
    "Python": (Path(os.__file__).parent, "*.py"),
    "C": (Path(torch.__file__).parent / "include", "*.h"),
    "JavaScript": (Path(sysconfig.get_paths()["purelib"]), "*.js"),
}
"""Folders that are there anyway; what a folder lacks is left out."""
MOST, TESTED = 500_000, 20_000  # bytes of a domain


class NextByte(nn.Module):
    """A causal Transformer of two blocks on bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(BYTES, 64), nn.Embedding(WINDOW, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, BYTES)

    def forward(self, text: Tensor) -> Tensor:
        """(batch, window) to the logits of what comes next, (batch, 256, window)."""
        length = text.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.token(text) + self.place.weight[:length]
        logits: Tensor = self.head(self.blocks(x, mask, is_causal=True))
        return logits.mT


def texts(tuning: bool) -> list[Domain]:
    """Windows of text and the same moved by one byte; each domain holds a stretch out."""
    domains = []
    for name, (folder, pattern) in TEXTS.items():
        found = b"".join(_bytes_of(folder, pattern))[:MOST]
        if len(found) < 4 * TESTED:
            print(f"{name} is left out: {folder} has too little {pattern}.")
            continue
        data = torch.frombuffer(bytearray(found), dtype=torch.uint8).long()
        data = data[:-TESTED] if tuning else data
        domains.append(Domain(name, _windows(data[:-TESTED]), _windows(data[-TESTED:])))
    return domains


def _bytes_of(folder: Path, pattern: str) -> Iterator[bytes]:
    left = MOST
    for path in sorted(folder.rglob(pattern)):
        if left <= 0:
            return
        content = path.read_bytes()
        content = lzma.decompress(content) if path.suffix == ".xz" else content
        left -= len(content)
        yield content


def _windows(data: Tensor) -> Pair:
    count = (len(data) - 1) // WINDOW * WINDOW
    return data[:count].view(-1, WINDOW), data[1 : count + 1].view(-1, WINDOW)


@torch.no_grad()
def loss_of_text(model: nn.Module, pair: Pair) -> float:
    """Nats for each byte."""
    return F.cross_entropy(model(pair[0]), pair[1]).item()


KINDS = {
    "corruptions": Kind(vit, corruptions, accuracy, "test accuracy, %", "more"),
    "classes": Kind(vit, classes, accuracy, "test accuracy, %", "more"),
    "text": Kind(NextByte, texts, loss_of_text, "test loss, nats for each byte", "less"),
}
