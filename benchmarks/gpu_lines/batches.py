"""Batches of Fashion-MNIST for several seeds at once, the same ones for every arm of a seed."""

import random
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpu_lines.arms import Shape
from gpu_lines.augment import DRAWS, augment, normalized, rectangle
from support import fashion

CLASSES, SMOOTHING = 10, 0.1
MIXUP = 0.8  # both parameters of the beta distribution; CutMix's are 1


class Images(NamedTuple):
    """All images, on the device: (n, 1, size, size) in uint8, and their labels (n,)."""

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, folder: Path, shape: Shape, device: str) -> Self:
        """From IDX files."""
        parts = (*fashion.load_bytes(folder, train=True), *fashion.load_bytes(folder, train=False))
        return cls(*(part[: shape.limit].to(device) for part in parts))


class Batch(NamedTuple):
    """A step's samples for S seeds, and what chance decides in the models.

    Args:
        images: (S, batch, 1, size, size), normalized.
        targets: (S, batch, classes).
        keep: (S, depth, 2, batch), what stochastic depth scales each residual by.
        order: (S, batch * tokens), a random order of the tokens.
    """

    images: Tensor
    targets: Tensor
    keep: Tensor
    order: Tensor


class Batches:
    """The batches of each step.

    Args:
        images: to train on.
        shape: of the runs.
        seeds: one run each.
    """

    def __init__(self, images: Images, shape: Shape, seeds: tuple[int, ...]) -> None:
        self.images, self.shape, self.seeds = images, shape, seeds
        self.device = images.train.device
        self.generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        self.per_epoch = len(images.train) // shape.batch_size
        self.steps = self.per_epoch * shape.epochs
        compiles = shape.compile and self.device.type == "cuda"
        self.augment = torch.compile(augment) if compiles else augment

    def _drawn(self, draw: str, *size: int) -> Tensor:
        """(S, *size), each seed's from its own generator."""
        parts = [
            getattr(torch, draw)(size, generator=generator, device=self.device)
            for generator in self.generators
        ]
        return torch.stack(parts)

    def batch(self, step: int) -> Batch:
        """That of a step; steps come in their order."""
        number, place = divmod(step, self.per_epoch)
        size, pixels = self.shape.batch_size, self.shape.size
        if place == 0:
            self.orders = torch.stack([self._order(seed, number) for seed in self.seeds])
        chosen = self.orders[:, place * size : (place + 1) * size]
        draws = self._drawn("rand", size, DRAWS).flatten(0, 1)
        noise = self._drawn("randn", size, 1, pixels, pixels).flatten(0, 1)
        x = self.augment(self.images.train[chosen].flatten(0, 1).float() / 255, draws, noise)
        images, targets = self._mixed(x.unflatten(0, chosen.shape), self._targets(chosen), step)
        survives = 1 - self.shape.drop_path
        keep = (self._drawn("rand", self.shape.depth, 2, size) < survives) / survives
        tokens = (pixels // self.shape.patch) ** 2 + 1
        return Batch(images, targets, keep, self._drawn("rand", size * tokens).argsort(1))

    def _order(self, seed: int, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        return torch.randperm(len(self.images.train), generator=generator).to(self.device)

    def _targets(self, chosen: Tensor) -> Tensor:
        sure = F.one_hot(self.images.labels[chosen], CLASSES).float()
        return sure * (1 - SMOOTHING) + SMOOTHING / CLASSES

    def _mixed(self, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mixup or CutMix of each batch with itself in the other order."""
        masks = torch.stack([self._mask(seed, step) for seed in self.seeds])
        mask = masks.to(self.device, non_blocking=True)[:, None]
        share = mask.mean((2, 3, 4))[..., None]
        other = images.flip(1)
        return other + mask * (images - other), share * targets + (1 - share) * targets.flip(1)

    def _mask(self, seed: int, step: int) -> Tensor:
        """(1, size, size): how much of each pixel stays."""
        drawn, pixels, one = random.Random(f"{seed} {step}"), self.shape.size, torch.ones(1)
        if drawn.random() < 0.5:
            return torch.full((1, pixels, pixels), drawn.betavariate(MIXUP, MIXUP))
        side = one * (1 - drawn.random()) ** 0.5
        right, down = one * drawn.random(), one * drawn.random()
        return 1 - rectangle(pixels, right, down, side, side)[0].float()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Of the test images, in percent."""
    model.eval()
    parts = zip(images.test.split(2500), images.test_labels.split(2500), strict=True)
    hits = [(model(normalized(x.float() / 255)).argmax(1) == y).sum() for x, y in parts]
    return 100 * torch.stack(hits).sum().item() / len(images.test)
