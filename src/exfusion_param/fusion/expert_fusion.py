"""The parametrization of a wrapped linear's tensor, registered with torch's `parametrize`."""

from __future__ import annotations

from torch import Tensor, nn

from ..fusion_weights.base import FusionWeights
from ..tensors.expert_starts import upcycled_experts


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
        self.is_unfilled = False  # see outside_access.py

    def forward(self, experts: Tensor) -> Tensor:
        """The fused tensor, shape (*S), of the stack `experts`, shape (N, *S)."""
        return self.fusion_weights.fuse_stack(experts)

    def right_inverse(self, tensor: Tensor) -> Tensor:
        """The stack, shape (N, *S), for a dense tensor, shape (*S).

        On registration, the stack passed to the constructor. Later, when the user assigns to
        `linear.weight`, a stack that fuses to the assigned tensor: now, or once a bank that is
        still zero is full.
        """
        if self._first_experts is not None:
            experts, self._first_experts = self._first_experts, None
            return experts
        fusion_weights = self.fusion_weights
        return upcycled_experts(tensor, fusion_weights.start(), fusion_weights.config.upcycle_noise)

    def extra_repr(self) -> str:
        """N and the shape of the fused tensor."""
        holders = self.fusion_weights.holders
        stacks = [holder.original for holder in holders if holder[0] is self]
        shapes = [f"{stack.shape[0]} x {tuple(stack.shape[1:])}" for stack in stacks if stack.ndim]
        return ", ".join(shapes)
