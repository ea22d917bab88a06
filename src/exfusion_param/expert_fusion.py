"""The module that is registered with `torch.nn.utils.parametrize`, see parametrization.py."""

from __future__ import annotations

from torch import Tensor, nn

from .experts import upcycled_experts
from .fusion_weights import FusionWeights
from .shards import assign, fuse


class ExpertFusion(nn.Module):
    """Fuses one expert stack, at each use of the fused tensor.

    Args:
        fusion_weights: the group's fusion weights.
        experts: the stack to start with, shape (N, *S).
        owns_weights: whether the fusion weights are this module's child; one module of each group.
    """

    fusion_weights: FusionWeights

    def __init__(self, fusion_weights: FusionWeights, experts: Tensor, owns_weights: bool) -> None:
        super().__init__()
        if owns_weights:
            self.fusion_weights = fusion_weights
        else:  # past nn.Module's registration, so that the state dict names them once
            self.__dict__["fusion_weights"] = fusion_weights
        self._first_experts: Tensor | None = experts

    def forward(self, experts: Tensor) -> Tensor:
        """The fused tensor, shape (*S), of the stack `experts`, shape (N, *S)."""
        return self.fusion_weights.fuse(experts)

    def right_inverse(self, tensor: Tensor) -> Tensor:
        """The stack, shape (N, *S), for a dense tensor, shape (*S).

        At registration that is the stack given to the constructor. After it, when the user assigns
        to `linear.weight`, it is one that fuses to the assigned tensor (once a zero bank is full).
        """
        if self._first_experts is not None:
            experts, self._first_experts = self._first_experts, None
            return experts
        weights = self.fusion_weights
        return upcycled_experts(tensor, weights.start(), weights.config.upcycle_noise)

    def dense(self, stack: Tensor) -> Tensor:
        """The fused tensor as the stack has it now, shape (*S); a DTensor if the stack is one."""
        return fuse(stack, self.fusion_weights())

    def start_from(self, stack: Tensor, experts: Tensor) -> None:
        """Start anew from whole experts, shape (N, *S)."""
        assign(stack, experts)
