"""The time of a training step by that of a dense twin, which trains in turns with it."""

import dataclasses
from statistics import median

from training import Loss, Trainer


@dataclasses.dataclass
class Row:
    """One kind of model.

    Args:
        kind: of ExFusion, or the peer.
        num_experts: N.
        step_by_dense: the ratio, median over rounds.
        lowest: of the rounds.
        highest: of the rounds.
        step_ms: median over rounds.
        dense_ms: of the dense twin.
    """

    kind: str
    num_experts: int
    step_by_dense: float
    lowest: float
    highest: float
    step_ms: float
    dense_ms: float


def measure(dense: Trainer, kind: str, num_experts: int, rounds: int) -> Row:
    """A kind and its dense twin in turns, after one round that is not timed."""
    ours, loss = Trainer(dense.task, kind, num_experts), dense.task.new_loss()
    return compare(dense, ours, loss, rounds)


def compare(dense: Trainer, ours: Trainer, loss: Loss, rounds: int) -> Row:
    """Two models in turns, after one round that is not timed."""
    pairs = [(dense.step(loss), ours.step(loss)) for _ in range(rounds + 1)][1:]
    ratios = [own / theirs for theirs, own in pairs]
    dense_ms, step_ms = (round(1e3 * median(times), 1) for times in zip(*pairs, strict=True))
    return Row(
        ours.kind,
        ours.num_experts,
        step_by_dense=round(median(ratios), 3),
        lowest=round(min(ratios), 3),
        highest=round(max(ratios), 3),
        step_ms=step_ms,
        dense_ms=dense_ms,
    )
