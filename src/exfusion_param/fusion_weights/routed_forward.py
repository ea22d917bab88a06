"""The `forward` of linears whose fusion weights follow their input, see fusion/linear_class.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..finding.place import PlaceInGroup, input_of


def routed_forward(dense: Any, place: PlaceInGroup) -> Callable[..., Any]:
    """The forward for a dense class, which a `TokenPool` runs, and ends after the last linear."""
    dense_forward = dense.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        def run_dense() -> Any:
            return dense_forward(self, *args, **kwargs)

        pool = self.parametrizations.weight[0].fusion_weights
        try:
            return pool.run(self, input_of(args, kwargs), place, run_dense)
        finally:
            if place.is_last:
                pool.end_forward()

    return forward
