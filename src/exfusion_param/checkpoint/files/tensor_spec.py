"""What a tensor on disk is before its contents are read."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TensorSpec(NamedTuple):
    """A tensor's shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the contents."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()
