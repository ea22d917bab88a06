"""Waits for other ranks before a first collective, which would wait for a missing one for ever.

Ranks meet in the store of the default process group, the only wait with a time limit that works on
all backends. Its getter is private; the public `new_group` meets there as well, but with the time
limit of its collectives.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch import distributed

from .ranks import Ranks

PATIENCE = {"optimizer step": 60.0, "forward": 300.0, "checkpoints": 300.0}
"""Seconds. The gradients of a backward are reduced before a step, so that ranks step together."""

_TEXTS = {
    "optimizer step": (
        "Fusion weights are reduced over",
        "train this model, give it the group of those that do: wrap(..., process_group=group).",
    ),
    "checkpoints": (
        "Checkpoints are written together by",
        "belong to this run, give the group of those that do: Checkpoints(..., process_group=group)"
        ", and to StopRequest too.",
    ),
}
_TEXTS["forward"] = _TEXTS["optimizer step"]

_own_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_meetings: weakref.WeakKeyDictionary[Any, Counter[Any]] = weakref.WeakKeyDictionary()


def await_ranks(ranks: Ranks, where: str) -> None:
    """Wait until all ranks are here, see `await_members`."""
    for group in ranks.groups:
        await_members(distributed.get_process_group_ranks(group), where)


def await_members(members: Sequence[int], where: str) -> None:
    """Wait until some ranks of the job are here.

    Args:
        members: their numbers, in the same order on each of them.
        where: "optimizer step", "forward" or "checkpoints".

    Raises:
        RuntimeError: some have not come in time.
    """
    counts = _meetings.setdefault(distributed.group.WORLD, Counter())
    counts[where, *members] += 1
    number = counts[where, *members]
    store: Any = distributed.distributed_c10d._get_default_store()
    place = f"exfusion_param/{where}/{number}/{','.join(map(str, members))}"
    here = distributed.get_rank()
    store.set(f"{place}/{here}", "here")
    if store.add(f"{place}/count", 1) == len(members):
        store.set(f"{place}/all", "here")
    try:
        store.wait([f"{place}/all"], timedelta(seconds=PATIENCE[where]))
    except RuntimeError as error:
        missing = [rank for rank in members if not store.check([f"{place}/{rank}"])]
        what, way_out = _TEXTS[where]
        raise RuntimeError(
            f"{what} the ranks {_listed(members)}, and of these {_listed(missing)} did not come to "
            f"their first {where} within {PATIENCE[where]:.0f} s of rank {here}. If they do not "
            f"{way_out}"
        ) from error


def apart(ranks: Ranks) -> Ranks:
    """The same ranks with process groups that nothing else uses.

    Made at the first call, which all of the ranks have to take part in.
    """
    if any(group not in _own_groups for group in ranks.groups):
        await_ranks(ranks, "forward")
        for group in ranks.groups:
            if group not in _own_groups:
                members = distributed.get_process_group_ranks(group)
                _own_groups[group] = distributed.new_group(members, use_local_synchronization=True)
    return Ranks(tuple(_own_groups[group] for group in ranks.groups))


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
