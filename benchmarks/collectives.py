"""Counts what ranks send each other: the collectives of processes with gloo.

Counted are the operators that reach torch's process groups, whoever calls them: FSDP2, DTensor, a
pipeline or an optimizer's hook. Each backend numbers its collectives, and as many have to be
counted.

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
from torch import Tensor, distributed
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "send", "receive"]
Seen = list[tuple[Kind, int]]

KINDS: dict[str, Kind] = {
    "c10d::_allgather_base_": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
    "c10d::allreduce_": "all-reduce",
    "c10d::send": "send",
    "c10d::recv_": "receive",
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


class _Counter(TorchDispatchMode):
    """Notes the collectives among the operators that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Seen = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own operators and collectives come next
        result = func(*args, **kwargs or {})
        if (kind := KINDS.get(func.name().split(".")[0])) is not None:
            self.seen.append((kind, _size_of(kind, args, result)))
        return result


def _size_of(kind: Kind, args: Any, result: Any) -> int:
    """The bytes of a collective as this module counts them."""
    if kind == "receive":
        return 0
    given = args[0] if isinstance(args[0], list) else [args[0]]
    size: int = sum(tensor.nbytes for tensor in given)
    if kind == "send":
        return size
    if kind == "all-reduce":
        return ring(_ranks_in(args), size)
    # The operators of c10d get the output as well, those of functional collectives return it.
    other = args[1] if isinstance(args[1], Tensor) else result
    return abs(other.nbytes - size)


def _ranks_in(args: Any) -> int:
    """The size of the process group, or of the named one, that an operator was called with."""
    group = args[1] if isinstance(args[1], torch.ScriptObject) else args[-1]
    find: Any = vars(distributed_c10d)["_resolve_process_group"]
    return (find(group) if isinstance(group, str) else distributed.ProcessGroup.unbox(group)).size()


@contextlib.contextmanager
def counted() -> Iterator[Seen]:
    """The collectives that this thread starts within, in order.

    Raises:
        RuntimeError: the backends have run others too.
    """
    before = _numbers()
    with _Counter() as counter:
        yield counter.seen
    ran = sum(number - before.get(group, 0) for group, number in _numbers().items())
    if ran != len(counter.seen):
        raise RuntimeError(
            f"The backends ran {ran} collectives, and {len(counter.seen)} were counted."
        )


def _numbers() -> dict[Any, int]:
    """How many collectives each process group of this rank has run; torch has no public list."""
    groups: Any = distributed_c10d._world.pg_map
    return {group: group._get_sequence_number_for_group() for group in groups}


def total(*parts: Seen, kind: Kind | None = None) -> int:
    """The bytes of some collectives, of one kind or of all."""
    return sum(size for seen in parts for k, size in seen if kind in (None, k))
