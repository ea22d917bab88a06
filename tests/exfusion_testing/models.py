"""Small models that the tests wrap."""

from typing import Literal

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Checkpointing = Literal["reentrant", "non-reentrant"]


class FFNs(nn.Module):
    """Residual FFNs and a head; two blocks by default."""

    def __init__(
        self,
        dim: int = 4,
        hidden: int = 6,
        depth: int = 2,
        bias: bool = True,
        checkpointing: Checkpointing | None = None,
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(Mlp(dim, hidden, bias=bias) for _ in range(depth))
        self.head = nn.Linear(dim, 3)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to (batch, tokens, 3)."""
        x = self.stem(x)
        for block in self.blocks:
            x = x + self._run(block, x)
        return self.head(x)

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.checkpointing is None:
            return block(x)
        return checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")


def inputs(dim: int = 4, batch: int = 4, tokens: int = 3, seed: int = 0) -> Tensor:
    """Random inputs, shape (batch, tokens, dim), float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, dim, generator=generator, dtype=torch.float64)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """A loss that is a mean over samples, so that equal micro-batches average to it."""
    y = model(x)
    return (y.square() + y.sin()).mean()
