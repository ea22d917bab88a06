"""The `forward` of linears that a memory bank watches, see fusion/linear_class.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ..finding.place import PlaceInGroup, input_of
from ..finding.projections import Projection


@dataclasses.dataclass(frozen=True)
class Observed:
    """A forward that tells the memory bank when the group's begins, with its input, and ends.

    Args:
        place: of the linear in its group.
    """

    place: PlaceInGroup

    def __call__(self, dense: Any, projection: Projection) -> Callable[..., Any]:
        """The forward for a dense class."""
        dense_forward, place, feature_dim = dense.forward, self.place, projection.feature_dim

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            x = input_of(args, kwargs)
            bank = self.parametrizations.weight[0].fusion_weights
            if place.is_first or (place.reads_input and bank.current is None):
                bank.observe(x.movedim(feature_dim, -1))
            else:
                bank.require_observed()
            try:
                return dense_forward(self, *args, **kwargs)
            finally:
                if place.is_last:
                    bank.end_forward()

        return forward
