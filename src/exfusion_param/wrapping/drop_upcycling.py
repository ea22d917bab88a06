"""Which entries of an FFN's tensors belong to the hidden units that Drop-Upcycling redraws."""

from __future__ import annotations

import torch

from ..finding.discovery import FFNGroup
from ..finding.projections import Projection, projections_of
from ..tensors.expert_starts import Dropped


class DroppedUnits:
    """The hidden units of one FFN that each expert redraws, in all of its linears alike.

    Args:
        group: a whole FFN.
        num_experts: N.
        ratio: share of the hidden units, in (0, 1].
        generator: on the CPU; chooses the units.

    Raises:
        ValueError: the group is not a whole FFN, so that it has no hidden units.
    """

    def __init__(
        self, group: FFNGroup, num_experts: int, ratio: float, generator: torch.Generator | None
    ) -> None:
        self.group = group
        *names, self.output = group.linears
        self.hidden = self._projection(self.output).in_features
        widths = {self._projection(fqn).out_features for fqn in names}
        is_whole = names and tuple(names) == group.inputs
        if not is_whole or not widths <= {self.hidden, 2 * self.hidden}:
            raise ValueError(
                f"{group.name!r} is not a whole FFN, so that it has no hidden units to redraw. "
                'Choose all of its linears, or use expert_init="upcycle".'
            )
        count = max(1, round(ratio * self.hidden))
        orders = [
            torch.randperm(self.hidden, generator=generator, device="cpu")  # not within "meta"
            for _ in range(num_experts)
        ]
        self.units = torch.stack(orders)[:, :count]  # (N, K)

    def of(self, fqn: str, name: str) -> Dropped | None:
        """The dropped entries of a linear's "weight" or "bias"; None for the output's bias."""
        projection = self._projection(fqn)
        if fqn == self.output:
            return Dropped(projection.weight_in, self.units) if name == "weight" else None
        # A first linear that makes value and gate in one holds the unit twice.
        copies = projection.out_features // self.hidden
        units = torch.cat([self.units + i * self.hidden for i in range(copies)], dim=1)
        return Dropped(projection.weight_out if name == "weight" else 0, units)

    def _projection(self, fqn: str) -> Projection:
        return projections_of([self.group.linears[fqn]])[0]
