"""Where fusion weights come from: fixed (`sw`), learned (`dw`), or a memory bank (`mb`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ExFusionConfig
from ..expert_config import ExpertConfig
from ..finding.discovery import FFNGroup
from ..finding.place import PlaceInGroup
from ..tensors import functional
from ..tensors.expert_starts import uniform_weights
from ..tensors.precision import accumulation_dtype
from ..tensors.shards import assign, local
from .bank_on_step import BankOnStep
from .base import FusionWeights
from .memory_bank import MemoryBank
from .split_backwards import noting_backwards, run_noting_backwards
from .zero_gradients import with_zero_gradient


def fusion_weights_for(group: FFNGroup, config: ExFusionConfig, seed: int) -> FusionWeights:
    """The fusion weights of the config's variant for linears that share them."""
    bank = BankOnStep if config.fuse_on == "step" else MemoryBank
    kinds = {"sw": StaticWeights, "dw": LearnedWeights, "mb": bank}
    return kinds[config.variant](group, config, seed)


class StaticWeights(FusionWeights):
    """`sw`: `w_i = 1/N`, fixed (Eq. 8)."""

    def forward(self) -> Tensor:
        """1/N, shape (N,)."""
        # Not a buffer: a constant one would come back from the meta device unset.
        like: Any = self.holders[0].original if self.holders else self.linears[0].weight
        dtype = accumulation_dtype(like.dtype)
        return uniform_weights(self.config.num_experts, local(like).device, dtype)

    def fuse_stack(self, experts: Tensor) -> Tensor:
        """The experts' mean, shape (*S), also while the group's other stacks are offloaded."""
        dtype = accumulation_dtype(experts.dtype)
        weights = uniform_weights(self.config.num_experts, local(experts).device, dtype)
        return functional.fuse(experts, weights)


class LearnedWeights(FusionWeights):
    """`dw`: one learned vector for the whole group, from 1/N on, without softmax (Eq. 9)."""

    def __init__(self, group: FFNGroup, config: ExpertConfig, seed: int) -> None:
        super().__init__(group, config, seed)
        self.weights = nn.Parameter(self.new_tensor(config.num_experts))
        self.gathered: Tensor | None = None  # while an optimizer steps on a sharded vector
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the weights to 1/N."""
        assign(self.weights, self.weights.new_full(self.weights.shape, 1 / self.config.num_experts))

    def forward(self) -> Tensor:
        """The learned vector, shape (N,)."""
        return noting_backwards(self, self.weights)

    def runs(self, place: PlaceInGroup) -> bool:
        """The last linear, to note which backwards pass it."""
        return place.is_last

    def run(
        self, linear: nn.Module, x: Tensor, place: PlaceInGroup, run_dense: Callable[[], Any]
    ) -> Any:
        """The output of a linear."""
        return run_noting_backwards(self, x, run_dense)

    def health(self) -> Tensor | None:
        """The vector, or this rank's part of it."""
        return local(self.weights)

    def follow_forward(
        self, linear: nn.Module, args: Any, kwargs: Any, output: Any = None
    ) -> Tensor | None:
        """Let autograd reach the vector, with a gradient of zeros until the optimizer's step."""
        return with_zero_gradient(output, self.weights) if self.training else None

    def current_weights(self) -> Tensor:
        """The learned vector; a sharded one as it was gathered last."""
        return self.weights.detach() if self.gathered is None else self.gathered

    def statistics(self, products: Tensor) -> Tensor:
        """`dL/dw`, shape (N,)."""
        return products

    def gradients(self, sums: Tensor) -> dict[nn.Parameter, Tensor]:
        """`dL/dw` is the vector's own."""
        return {self.weights: sums}
