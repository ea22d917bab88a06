"""Counts what ranks send each other: the collectives of processes with gloo.

Counted are the calls that reach torch's process groups, whoever makes them: FSDP2, a pipeline, an
optimizer's hook, or DTensor, whose collectives are operators. Each backend numbers its collectives,
and as many have to be counted.

Bytes are those of one rank, for any backend that sends no more than it has to:
- all-gather: what the rank receives, the whole less its own part;
- reduce-scatter: what it sends, the whole less its own part;
- all-reduce of S bytes among k ranks: 2 (k - 1) / k S, as in a ring;
- send, between the stages of a pipeline: what it sends; nothing for the receive of another one.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import distributed
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "send", "receive"]
Seen = list[tuple[Kind, int]]

METHODS: dict[str, Kind] = {  # of torch's process group, under the names of several versions
    "all_gather_single": "all-gather",
    "_allgather_base": "all-gather",
    "reduce_scatter_single": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
    "allreduce": "all-reduce",
    "send": "send",
    "recv": "receive",
}
OPERATORS: dict[str, Kind] = {  # which DTensor uses, and which reach a group without its methods
    "_c10d_functional::all_gather_into_tensor": "all-gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce-scatter",
    "_c10d_functional::all_reduce": "all-reduce",
    "_c10d_functional::all_reduce_": "all-reduce",
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


def ring(ranks: int, size: int) -> int:
    """The bytes that each rank sends to all-reduce so many bytes."""
    return 2 * (ranks - 1) * size // ranks


class _Operators(TorchDispatchMode):
    """Notes the collectives among the operators that run within it."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own operators and collectives come next
        result = func(*args, **kwargs or {})
        if (kind := OPERATORS.get(func.name().split(".")[0])) is not None:
            find: Any = vars(distributed_c10d)["_resolve_process_group"]
            self.seen.append((kind, size_of(kind, find(args[-1]).size(), args[0], result)))
        return result


def _noting(kind: Kind, method: Callable[..., Any], seen: Seen) -> Callable[..., Any]:
    def call(group: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((kind, size_of(kind, group.size(), *args[:2])))
        return method.__get__(group)(*args, **kwargs)

    return call


def size_of(kind: Kind, ranks: int, one: Any, other: Any) -> int:
    """The bytes of a collective as this module counts them.

    Args:
        kind: of the collective.
        ranks: how many take part.
        one: the tensor that is given, or a list of several; or that is gathered into.
        other: of a gather or a scatter the other tensor.
    """
    if kind == "receive":
        return 0
    if kind in ("all-gather", "reduce-scatter"):
        return abs(one.nbytes - other.nbytes)
    size: int = sum(tensor.nbytes for tensor in (one if isinstance(one, list) else [one]))
    return size if kind == "send" else ring(ranks, size)


@contextlib.contextmanager
def counted() -> Iterator[Seen]:
    """The collectives that this process starts within, in order.

    Raises:
        RuntimeError: the backends have run others too.
    """
    group_type: Any = distributed.ProcessGroup
    seen: Seen = []
    methods = {name: vars(group_type)[name] for name in METHODS if name in vars(group_type)}
    before = _numbers()
    for name, method in methods.items():
        setattr(group_type, name, _noting(METHODS[name], method, seen))
    try:
        with _Operators(seen):
            yield seen
    finally:
        for name, method in methods.items():
            setattr(group_type, name, method)
    ran = sum(number - before.get(group, 0) for group, number in _numbers().items())
    if ran != len(seen):
        raise RuntimeError(f"The backends ran {ran} collectives, and {len(seen)} were counted.")


def _numbers() -> dict[Any, int]:
    """How many collectives each process group of this rank has run; torch has no public list."""
    groups: Any = distributed_c10d._world.pg_map
    return {group: group._get_sequence_number_for_group() for group in groups}


def total(*parts: Seen, kind: Kind | None = None) -> int:
    """The bytes of some collectives, of one kind or of all."""
    return sum(size for seen in parts for k, size in seen if kind in (None, k))
