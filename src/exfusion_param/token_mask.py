"""Leaves padding out of what a router pools over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from .memory_bank import MemoryBank


@contextlib.contextmanager
def token_mask(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Within this context the routers of a model's memory banks count the masked-in tokens alone.

        with exf.token_mask(model, mask):
            loss = loss_fn(model(x), y)
            loss.backward()

    Models of transformers need no such call: the `attention_mask` that they are given counts. Under
    activation checkpointing the backward belongs into the context too, as it runs forwards.

    Args:
        model: a wrapped model.
        mask: shape (batch, tokens), true or 1 where a token counts, false or 0 for padding. An FFN
            with another number of tokens, as in a vision tower, counts all of its own.

    Raises:
        ValueError: the model has no memory bank.
    """
    banks = [module for module in model.modules() if isinstance(module, MemoryBank)]
    if not banks:
        raise ValueError(
            f"{type(model).__name__} has no memory bank, so nothing pools over tokens."
        )
    before = [bank.token_mask for bank in banks]
    for bank in banks:
        bank.token_mask = mask
    try:
        yield
    finally:
        for bank, previous in zip(banks, before, strict=True):
            bank.token_mask = previous
