"""How the experts of one tensor start: drawn from a seed and a name, the same at any time."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from .drop_upcycling import Dropped
from .dtypes import accumulation_dtype
from .expert_config import ExpertConfig
from .experts import (
    drop_upcycled_experts,
    independent_experts,
    named_generator,
    uniform_weights,
    upcycled_experts,
)


@dataclasses.dataclass(frozen=True)
class ExpertStart:
    """Draws the expert stack of one tensor of a linear.

    Args:
        config: the settings.
        seed: of all draws of one `wrap`.
        name: of the tensor in the model, such as "blocks.0.mlp.fc1.weight".
        dropped: the entries that drop-upcycling draws again, if it does.
    """

    config: ExpertConfig
    seed: int
    name: str
    dropped: Dropped | None = None

    def draw(self, tensor: Tensor) -> Tensor:
        """The stack, shape (N, *S), around the dense tensor, shape (*S).

        Draws depend on the seed, the name and the kind of device only, so that linears get the same
        experts whichever others are wrapped, at any time and on any number of ranks.
        """
        generator = named_generator(self.seed, self.name, tensor.device)
        if self.config.expert_init == "independent":
            return independent_experts(tensor, self.config.num_experts, generator)
        if self.dropped is not None:
            return drop_upcycled_experts(tensor, *self.dropped, generator)
        # Drop-upcycling leaves exact copies of what belongs to no hidden unit.
        noise = self.config.upcycle_noise if self.config.expert_init == "upcycle" else 0.0
        dtype = accumulation_dtype(tensor.dtype)
        weights = uniform_weights(self.config.num_experts, tensor.device, dtype)
        return upcycled_experts(tensor, weights, noise, generator)
