"""What an optimizer's step looks up once of each parameter that is fused from experts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from .fused_parameter import FusedParameter

EXPERTS = "experts"
"""The key of the expert stack in an optimizer's state of a parameter."""


@dataclasses.dataclass(slots=True, eq=False)
class Turn:
    """A fused parameter in one step, with what the step asks for often.

    Args:
        fused: itself.
        parameter: the linear's, shape (*S).
        part: what this rank holds of it, without a graph.
        state: of its optimizer, with the experts.
        stack: the experts, shape (N, *S); a DTensor if the parameter is one.
        experts: this rank's part of them.
        group: index of the optimizer's parameter group; None if another one holds the parameter.
    """

    fused: FusedParameter
    parameter: nn.Parameter
    part: Tensor
    state: dict[str, Any]
    stack: Tensor
    experts: Tensor
    group: int | None

    def is_of(self, parameter: nn.Parameter, group: int | None) -> bool:
        """Whether this is the turn of another step, too: nothing was moved or loaded since."""
        return (
            parameter is self.parameter
            and group == self.group
            and self.state.get(EXPERTS) is self.stack
            and type(parameter) is nn.Parameter
            and parameter.data_ptr() == self.part.data_ptr()
            and parameter.dtype == self.part.dtype
        )

    def identity(self) -> tuple[int, int]:
        """Which experts these are; a load in place changes the version."""
        return id(self.stack), self.experts._version

    @property
    def gradient(self) -> Tensor | None:
        """`G` of the parameter, if this step moves its experts; a DTensor if the parameter is."""
        return self.parameter.grad if self.group is not None else None
