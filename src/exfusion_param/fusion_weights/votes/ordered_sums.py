"""Sums over the ranks in forwards and backwards, which raise where ranks sum different things.

Note [The order of sums]
Collectives pair by their order. Where one rank skips an FFN that another runs, as stochastic depth
drawn on each rank does, the sums of two FFNs would be mixed silently, and in the end one rank would
wait for ever. So:

- each sum takes along a tag of its FFN and direction, and the tag's square: they are `k t` and
  `k t^2` of a rank's own tag t on all k ranks, or on none;
- all sums have one size for N experts, so that any two of them can pair;
- they have process groups of their own, so that they do not pair with those of DDP or FSDP.

On a CPU a difference raises at once. To read it on a GPU would synchronize it at each FFN, so there
it is looked at with the optimizer's step.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ...tensors.arrival import apart
from ...tensors.ranks import ALONE, Ranks

Direction = Literal["forward", "backward"]

_TAGS = 1 << 20
"""So many names have tags of their own, whose squares 2,000 ranks sum exactly in float64."""


class OrderedSums:
    """The sums over the ranks of one FFN group.

    Args:
        name: of the group, alike on all ranks.
        find_ranks: a bound method that gives the ranks that train the group; it is held weakly.
    """

    def __init__(self, name: str, find_ranks: Callable[[], Ranks]) -> None:
        self.has_differed: Tensor | None = None  # a boolean, shape (), on a GPU
        self._name = name
        self._find_ranks = weakref.WeakMethod(find_ranks)

    def ranks(self) -> Ranks:
        """The ranks that train the group."""
        find = self._find_ranks()
        return ALONE if find is None else find()

    def sum(self, tensor: Tensor, direction: Direction) -> Tensor:
        """The sum of a tensor of one dimension over the ranks; all of them call this together.

        Raises:
            RuntimeError: on every rank, if they sum for different FFNs or directions.
        """
        ranks = self.ranks()
        if ranks is ALONE:
            return tensor
        ranks = apart(ranks)
        tag = 2 * (zlib.crc32(self._name.encode()) % _TAGS) + (direction == "backward")
        tags = tensor.new_full((2,), tag, dtype=torch.float64)
        tags[1:].square_()
        sums = ranks.sum(torch.cat([tensor.double(), tags]))
        differs = (sums[-2:] != ranks.count * tags).any()
        if differs.is_cuda:
            self.has_differed = (
                differs if self.has_differed is None else self.has_differed | differs
            )
        elif differs:
            where = ranks.gather(f"the {direction} of {self._name!r}")
            other = next(index for index, what in enumerate(where) if what != where[0])
            raise RuntimeError(
                text_of_difference(f": rank 0 {where[0]}, rank {other} {where[other]}")
            )
        return sums[:-2].to(tensor.dtype)


def text_of_difference(details: str = "") -> str:
    """The text of the error: what has happened, and the ways out.

    Args:
        details: what each rank ran, if it is known.
    """
    return (
        f"The ranks ran different FFNs at the same time{details}. "
        'Under fuse_on="forward" routers pool over the ranks in each forward, so all ranks must '
        "run the same FFNs in the same order. If stochastic depth skips whole blocks, seed its "
        'draws alike on all ranks, or wrap with fuse_on="step", which pools at the optimizer\'s '
        "step only."
    )
