"""The `forward` of linears that their fusion weights run, see fusion/linear_class.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..finding.place import PlaceInGroup, input_of


def routed_forward(dense: Any, place: PlaceInGroup) -> Callable[..., Any]:
    """The forward for a dense class, which the fusion weights run until the last linear has run."""
    dense_forward = dense.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        def run_dense() -> Any:
            return dense_forward(self, *args, **kwargs)

        if "weight" not in self.parametrizations:
            raise half_removed(self)
        weights = self.parametrizations.weight[0].fusion_weights
        try:
            return weights.run(self, input_of(args, kwargs), place, run_dense)
        finally:
            if place.is_last:
                weights.end_forward()

    return forward


def half_removed(linear: Any) -> RuntimeError:
    """The error for a linear whose bias is still fused and whose weight is not any more."""
    return RuntimeError(
        f"The weight of a wrapped {type(linear).__bases__[0].__name__} was taken from its experts "
        "by remove_parametrizations, and its bias is still fused. Call exfusion_param.fuse(model) "
        "instead of it; or let it take weight and bias of all linears of the FFN."
    )
