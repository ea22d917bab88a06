"""Statistics of a few seeds: means, standard errors, and the smallest significant difference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95  # in all comparisons of a study together


class Spread(NamedTuple):
    """Mean and standard deviation of a sample of this size.

    Example:
        >>> spread = Spread.of([1.0, 2.0, 3.0])
        >>> spread.mean, spread.deviation, round(spread.error, 3)
        (2.0, 1.0, 0.577)
    """

    mean: float
    deviation: float
    size: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of some values; the deviation of one value is nan."""
        deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
        return cls(statistics.fmean(values), deviation, len(values))

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.deviation / math.sqrt(self.size)

    def __str__(self) -> str:
        return self.shown(3)

    def shown(self, places: int) -> str:
        """Mean and deviation with this many decimal places."""
        spread = f" ± {self.deviation:.{places}f}" if self.size > 1 else ""
        return f"{self.mean:.{places}f}{spread}"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """The differences of two arms, seed by seed."""
    return Spread.of([our - their for our, their in zip(ours, theirs, strict=True)])


def smallest_told(difference: Spread, comparisons: int = 1) -> float:
    """The smallest mean difference that is significant in a paired t-test.

    The error probability is divided among the comparisons (Bonferroni).

    Returns:
        Student's t for `CONFIDENCE`, times the standard error.
    """
    confidence = 1 - (1 - CONFIDENCE) / comparisons
    return student_t(confidence, difference.size - 1) * difference.error


def student_t(confidence: float, freedom: int) -> float:
    """The t with `P(|T| < t) = confidence`, by bisection."""
    low, high = 0.0, math.pi / 2  # of atan(t / sqrt(freedom))
    for _ in range(60):
        middle = (low + high) / 2
        if _within(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) tan(angle)); Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = freedom % 2
    term, total = (cosine if is_odd else 1.0), 0.0
    for k in range(1 + is_odd, freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return (angle + sine * total) * 2 / math.pi if is_odd else sine * total
