"""The record that fusion weights keep of tensors that are fused at an optimizer's step."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from ..tensors.expert_starts import ExpertStart


class Fused(Protocol):
    """A weight or bias under `fuse_on="step"`, see step/fused_parameter.py."""

    fusion_weights: Any  # the FusionWeights of its group
    linear: nn.Module
    name: str
    start: ExpertStart
    base: Tensor | None

    @property
    def parameter(self) -> nn.Parameter:
        """The linear's own parameter, shape (*S)."""

    def refuse_flat(self) -> None:
        """Raise for the flat parameters of FSDP1."""

    def require_own(self) -> None:
        """Raise if the parameter is not the linear's own any more."""

    def experts(self) -> Tensor:
        """The experts, shape (N, *S), as they are or as they would be drawn."""

    def has_stepped(self) -> bool:
        """Whether an optimizer has moved the experts."""

    def is_untouched(self) -> bool:
        """Whether the parameter is what `wrap` made of it."""

    def remove_experts(self) -> None:
        """Take the experts away from their optimizer."""
