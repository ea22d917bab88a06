"""Accuracies of several runs on the same images, and how far apart chance moves them."""

import math
from typing import NamedTuple

from torch import Tensor


def accuracy(is_right: Tensor) -> float:
    """Share of the images that are classified rightly, in percent."""
    return 100 * is_right.double().mean().item()


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of n values, in percent.

    Of zeros and ones, whose mean is an accuracy p, it is sqrt(p (1 - p) / n).
    """
    return 100 * values.double().std(correction=0).item() / math.sqrt(len(values))


class Difference(NamedTuple):
    """An accuracy minus another one.

    Args:
        points: the difference, in percentage points.
        error: its standard error, in percentage points.
    """

    points: float
    error: float

    @classmethod
    def of(cls, ours: Tensor, theirs: Tensor) -> "Difference":
        """Compare two runs image by image.

        Args:
            ours: whether a run classifies each image rightly.
            theirs: the same of another run, for the same images.
        """
        gains = ours.double() - theirs.double()  # 1, 0 or -1 for each image
        return cls(100 * gains.mean().item(), standard_error(gains))

    @property
    def is_clear(self) -> bool:
        """Whether the difference is larger than twice its standard error."""
        return abs(self.points) > 2 * self.error

    def __str__(self) -> str:
        verdict = "larger" if self.is_clear else "not larger"
        return (
            f"{self.points:+.2f} points, with a standard error of {self.error:.2f} points: "
            f"{verdict} than twice its standard error"
        )
