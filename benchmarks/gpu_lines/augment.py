"""The recipe's augmentation of images, a batch at once on the device where the images are.

RandAugment "rand-m9-mstd0.5-inc1" with timm's operations and levels, crops, flips and random
erasing, for grey images. timm works on one image at a time on the CPU, which is too slow for a GPU
that trains several small models. All chance comes from the draws that are passed in.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

OPERATIONS = 15
DRAWS = 6 + 2 * 4 + 5  # numbers for each image: crop and flip, two operations, erasing
MEAN, DEVIATION = 0.286, 0.353  # of Fashion-MNIST


def augment(images: Tensor, draws: Tensor, noise: Tensor) -> Tensor:
    """Augmented and normalized images.

    Args:
        images: (n, 1, height, width), from 0 to 1.
        draws: (n, DRAWS), uniform from 0 to 1.
        noise: as the images, normal; erased parts are filled with it.
    """
    crop, first, second, erased = draws.split((6, 4, 4, 5), dim=1)
    x = _sampled(images, _crops(crop))
    for drawn in (first, second):
        x = _operation(x, drawn)
    return _erase((x - MEAN) / DEVIATION, erased, noise)


def normalized(images: Tensor) -> Tensor:
    """Images from 0 to 1 without augmentation."""
    return (images - MEAN) / DEVIATION


def _matrices(n: Tensor, *entries: Tensor | float) -> Tensor:
    """Affine maps (n, 2, 3) of these six entries, each a number or (n,)."""
    filled = [torch.zeros_like(n) + entry for entry in entries]
    return torch.stack(filled, dim=1).view(-1, 2, 3)


def _sampled(x: Tensor, matrices: Tensor) -> Tensor:
    grid = F.affine_grid(matrices, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def _crops(u: Tensor) -> Tensor:
    """Crops of 8 to 100 % of the area, half of them flipped."""
    area, ratio, right, down, flip, _ = u.unbind(1)
    area, ratio = 0.08 + 0.92 * area, torch.exp((2 * ratio - 1) * math.log(4 / 3))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    sign = torch.where(flip < 0.5, 1.0, -1.0)
    x, y = (2 * right - 1) * (1 - width), (2 * down - 1) * (1 - height)
    return _matrices(area, sign * width, 0.0, x, 0.0, height, y)


def _operation(x: Tensor, u: Tensor) -> Tensor:
    """One of RandAugment's operations on each image, with a probability of a half."""
    chosen, deviate, sign, applied = u.unbind(1)
    number = (chosen * OPERATIONS).long()
    number = number.where(applied < 0.5, torch.full_like(number, -1))
    level = 9 + 0.5 * math.sqrt(2) * torch.erfinv((2 * deviate - 1).clamp(-0.999, 0.999))
    level = level.clamp(0, 10) / 10
    sign = torch.where(sign < 0.5, -1.0, 1.0)
    moved = _sampled(x, _geometry(number, level * sign))
    changed = torch.where(_column(number < 5), moved, x)
    for place, value in enumerate(_tones(x, _column(level), _column(sign)), start=5):
        changed = torch.where(_column(number == place), value, changed)
    return torch.where(_column(number >= 0), changed, x)


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _geometry(number: Tensor, level: Tensor) -> Tensor:
    """Operations 0 to 4: rotation, shears, translations; others leave the image in place."""
    level_of = [level * (number == place) for place in range(5)]
    angle = math.radians(30) * level_of[0]
    cos, sin = angle.cos(), angle.sin()
    shear_x, shear_y = 0.3 * level_of[1], 0.3 * level_of[2]
    x, y = 0.9 * level_of[3], 0.9 * level_of[4]  # of half an image
    return _matrices(level, cos, shear_x - sin, x, shear_y + sin, cos, y)


def _tones(x: Tensor, level: Tensor, sign: Tensor) -> list[Tensor]:
    """Operations 5 to 14, each on all images."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    factor = (1 + 0.9 * level * sign).clamp(min=0.1)
    steps = 2 ** (8 - (4 - (4 * level).floor()))  # of 256 grey values
    grey, bright = (255 * x).round(), x.mean((2, 3), keepdim=True)
    smooth = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    added = torch.where(x < 0.5, (x + 110 / 255 * level).clamp(max=1), x)
    return [
        (x - low) / (high - low).clamp(min=1 / 255),  # auto-contrast
        _equalized(x),
        1 - x,
        (grey / steps).floor() * steps / 255,  # posterize
        torch.where(x < 1 - level, x, 1 - x),  # solarize
        added,
        x,  # colour: there is none
        (bright + factor * (x - bright)).clamp(0, 1),  # contrast
        (factor * x).clamp(0, 1),  # brightness
        (smooth + factor * (x - smooth)).clamp(0, 1),  # sharpness
    ]


def _equalized(x: Tensor) -> Tensor:
    """Grey values by their rank, in Pillow's whole numbers."""
    grey = (255 * x).round().long().flatten(1)
    counts = torch.zeros(len(x), 256, device=x.device)
    counts.scatter_add_(1, grey, torch.ones_like(grey, dtype=counts.dtype))
    below = counts.cumsum(1) - counts
    step = (below.gather(1, grey.amax(1, keepdim=True)) / 255).floor()
    ranks = ((below + (step / 2).floor()) / step.clamp(min=1)).floor().clamp(max=255) / 255
    return torch.where(_column(step[:, 0] > 0), ranks.gather(1, grey).view_as(x), x)


def _erase(x: Tensor, u: Tensor, noise: Tensor) -> Tensor:
    """Noise in a rectangle of 2 to 33 % of the area, in a quarter of the images."""
    chance, area, ratio, right, down = u.unbind(1)
    area, ratio = 0.02 + (1 / 3 - 0.02) * area, torch.exp((2 * ratio - 1) * math.log(1 / 0.3))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    inside = rectangle(x.shape[-1], right, down, width, height) & _column(chance < 0.25)
    return torch.where(inside, noise, x)


def rectangle(size: int, right: Tensor, down: Tensor, width: Tensor, height: Tensor) -> Tensor:
    """Which pixels lie within a rectangle, (n, 1, size, size).

    Args:
        size: pixels of the image.
        right: (n,), 0 puts it to the left edge, 1 to the right one.
        down: (n,), 0 puts it to the upper edge.
        width: (n,), by the image's.
        height: (n,), by the image's.
    """
    places = (torch.arange(size, device=right.device) + 0.5) / size
    left, top = (right * (1 - width))[:, None], (down * (1 - height))[:, None]
    columns = (places >= left) & (places < left + width[:, None])
    rows = (places >= top) & (places < top + height[:, None])
    return (rows[:, :, None] & columns[:, None, :])[:, None]
