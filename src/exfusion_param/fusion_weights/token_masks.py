"""Leaves padding out of what a router pools over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from .token_pool import TokenPool


@contextlib.contextmanager
def token_mask(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Within this context the routers of a model count only the masked-in tokens.

        with exf.token_mask(model, mask):
            loss = loss_fn(model(x), y)
            loss.backward()

    Models of transformers need no such call: the `attention_mask` that they are given counts. Under
    activation checkpointing the backward belongs into the context too, as it runs forwards.

    Args:
        model: a wrapped model.
        mask: shape (batch, tokens), true or 1 where a token counts, false or 0 for padding. FFNs
            whose input is (tokens, batch, D) follow it too. An FFN with other tokens, as in a
            vision tower, counts all of its own, with a warning.

    Raises:
        ValueError: the model has no router.

    Examples:
        >>> model = exf.wrap(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
        >>> mask = torch.tensor([[1, 1, 1], [1, 0, 0]])  # the second sample is one token long
        >>> with exf.token_mask(model, mask):
        ...     model(torch.randn(2, 3, 8)).sum().backward()
    """
    pools = [module for module in model.modules() if isinstance(module, TokenPool)]
    if not pools:
        raise ValueError(f"{type(model).__name__} has no router, so nothing pools over tokens.")
    before = [pool.token_mask for pool in pools]
    for pool in pools:
        pool.token_mask = mask
    try:
        yield
    finally:
        for pool, previous in zip(pools, before, strict=True):
            pool.token_mask = previous
