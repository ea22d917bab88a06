"""The loss that keeps gates from choosing the same experts for all samples."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from ..fusion.lookup import groups_of
from ..tensors.ranks import ALONE, Ranks
from .gate import Gate
from .gating import squared_variation


def balance_loss(model: nn.Module) -> Tensor:
    """`balance_weight (CV^2(importance) + CV^2(load))`, summed over all gates.

        loss = task_loss + meo.balance_loss(model)

    The loss of Shazeer et al. (arXiv 1701.06538, Eq. 6 to 11), which keeps gates from choosing the
    same experts for all samples. The importance of an expert is the sum of its gates over the
    samples, or segments, of the model's last forward in training; its load is the expected number
    of samples that choose it. Every rank returns the loss for the samples of all ranks, so the mean
    of the ranks' losses, which DDP and FSDP compute, is that of one rank with all samples.

    Args:
        model: a model wrapped by `meo.wrap`, between its forward and the backward.

    Returns:
        A scalar in float32 or float64; zero for a forward in eval or without gradients.

    Raises:
        ValueError: the model has no gates.
        RuntimeError: there was no forward in training, or it had no graph; or another thread has
            started one since.

    Examples:
        >>> model = meo.wrap(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), num_experts=4)
        >>> task_loss = model(torch.randn(2, 3, 8)).square().mean()
        >>> loss = task_loss + meo.balance_loss(model)
        >>> loss.backward()
    """
    gates = gates_of(model)
    if torch.is_grad_enabled() and all(gate.training and not gate.recorded for gate in gates):
        raise RuntimeError(
            "balance_loss() comes after a forward in training and before the optimizer's step, and "
            "here is none: the last forward ran in eval mode, under no_grad, or under activation "
            "checkpointing without use_reentrant=False; or an optimizer has stepped since."
        )
    by_size: dict[Any, list[Gate]] = defaultdict(list)
    for gate in gates:
        if gate.recorded:
            gate.forwards.require_own_thread(gate)
            by_size[gate.config.num_experts, gate.gate.device].append(gate)
    total = torch.zeros((), device=gates[0].gate.device)
    for alike in by_size.values():
        values = torch.stack([_statistics(gate) for gate in alike])
        if (ranks := alike[0].ranks) is not ALONE:
            values = _SumOverRanks.apply(values, ranks)
        factors = values.new_tensor([gate.config.balance_weight for gate in alike])
        loss = (squared_variation(values).sum(dim=1) * factors).sum()
        total = total + loss.to(total.device)
    return total


def gates_of(model: nn.Module) -> list[Gate]:
    """The gates of a model, in its order.

    Raises:
        ValueError: it has none.
    """
    gates = [weights for weights in groups_of(model) if isinstance(weights, Gate)]
    if not gates:
        raise ValueError(f"{type(model).__name__} has no gates. Wrap it with meo.wrap(model).")
    return gates


def _statistics(gate: Gate) -> Tensor:
    """Importance and load of the experts, shape (2, N)."""
    every = [torch.stack([gates.importance, gates.load]) for gates in gate.recorded]
    return torch.stack(every).sum(dim=0)


class _SumOverRanks(torch.autograd.Function):
    """The sum over the ranks; all of them have the same loss."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum(values.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """The mean of the ranks' losses divides by their number; the sum makes up for it."""
        return ctx.ranks.sum(gradient.clone()), None
