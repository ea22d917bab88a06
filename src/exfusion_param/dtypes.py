"""What sums over experts are computed in."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in: float32, or float64 for float64 experts."""
    return torch.promote_types(dtype, torch.float32)
