"""Counts what ranks send each other: the collectives of processes with gloo.

Counted are the calls that reach torch's process group, whoever makes them: FSDP2, DTensor or an
optimizer's hook. The backend numbers its collectives, and as many have to be counted.

Bytes are those of one rank, for any backend that sends no more than it has to:
- all-gather: what the rank receives, the whole less its own part;
- reduce-scatter: what it sends, the whole less its own part;
- all-reduce of S bytes among k ranks: 2 (k - 1) / k S, as in a ring.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

Kind = Literal["all-gather", "reduce-scatter", "all-reduce"]
Seen = list[tuple[Kind, int]]

METHODS: dict[str, Kind] = {  # of torch's process group, under the names of several versions
    "all_gather_single": "all-gather",
    "_allgather_base": "all-gather",
    "reduce_scatter_single": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
    "allreduce": "all-reduce",
}


def on_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(rank, *args)` returns on each rank, a process with gloo; plain values."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_run, (count, folder, function, args), nprocs=count)
        return [torch.load(f"{folder}/result-{rank}") for rank in range(count)]


def _run(rank: int, count: int, folder: str, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count
    )
    try:
        torch.save(function(rank, *args), f"{folder}/result-{rank}")
        distributed.barrier()  # a rank that leaves early would take its connections along
    finally:
        distributed.destroy_process_group()


def size_of(kind: Kind, ranks: int, tensors: Sequence[Any]) -> int:
    """The bytes of a collective as this module counts them, from the arguments of its method."""
    if kind == "all-reduce":
        return sum(ring(ranks, tensor.nbytes) for tensor in tensors[0])
    output, given = tensors[:2]
    return abs(output.nbytes - given.nbytes)


def ring(ranks: int, size: int) -> int:
    """The bytes that each rank sends to all-reduce so many bytes."""
    return 2 * (ranks - 1) * size // ranks


@contextlib.contextmanager
def counted() -> Iterator[Seen]:
    """The collectives that this process starts within, in order.

    Raises:
        RuntimeError: the backend has run others too.
    """
    world: Any = distributed.group.WORLD
    group_type: Any = distributed.ProcessGroup
    seen: Seen = []
    methods = {name: vars(group_type)[name] for name in METHODS if name in vars(group_type)}
    before = world._get_sequence_number_for_group()
    for name, method in methods.items():
        setattr(group_type, name, _noting(METHODS[name], method, seen))
    try:
        yield seen
    finally:
        for name, method in methods.items():
            setattr(group_type, name, method)
    ran = world._get_sequence_number_for_group() - before
    if ran != len(seen):
        raise RuntimeError(f"The backend ran {ran} collectives, and {len(seen)} were counted.")


def _noting(kind: Kind, method: Callable[..., Any], seen: Seen) -> Callable[..., Any]:
    def call(group: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((kind, size_of(kind, group.size(), args)))
        return method.__get__(group)(*args, **kwargs)

    return call


def total(*parts: Seen, kind: Kind | None = None) -> int:
    """The bytes of some collectives, of one kind or of all."""
    return sum(size for seen in parts for k, size in seen if kind in (None, k))
