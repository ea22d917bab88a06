"""The processes of a job: their start and end, and their batches."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import Dataset, IterableDataset, Subset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler


@contextmanager
def job() -> Iterator[torch.device]:
    """Join the job that torchrun has started, or be one of a single process.

    Yields:
        This rank's device: a GPU of its own with NCCL, or the CPU with Gloo.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        # torchrun may keep its store when it restarts ranks, with the addresses of dead ones in it.
        store, rank, count = next(rendezvous("env://"))
        store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=count)
    else:
        address = "tcp://localhost:0"
        distributed.init_process_group(backend, address, rank=0, world_size=1)
    yield device
    distributed.barrier()  # a rank that leaves early would take its connections along
    distributed.destroy_process_group()


def place() -> tuple[int, int]:
    """The rank, and how many there are; also before the job begins."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def is_first() -> bool:
    """Whether this rank is the one that prints and writes logs."""
    return distributed.get_rank() == 0


def say(text: object) -> None:
    """Print only on the first rank."""
    if is_first():
        print(text, flush=True)


def share(batch_size: int) -> int:
    """How many samples of a step's batch each rank has.

    Raises:
        SystemExit: they would get unequal shares.
    """
    world = distributed.get_world_size()
    if batch_size % world:
        raise SystemExit(f"{world} ranks do not share a batch of {batch_size} alike.")
    return batch_size // world


def mine(data: Dataset[Any]) -> Subset[Any]:
    """This rank's part of some samples."""
    rank, world = place()
    return Subset(data, range(rank, len(data), world))  # type: ignore[arg-type]


def as_lists(samples: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """A batch of samples that do not stack: a list for each of a sample's entries."""
    return [list(entries) for entries in zip(*samples, strict=True)]


def loader(
    data: Dataset[Any], batch_size: int, workers: int = 0, seed: int = 0, **more: Any
) -> StatefulDataLoader:
    """Loads this rank's share of each step's batch, shuffled; a checkpoint takes its place along.

    Args:
        data: samples.
        batch_size: of a step, on all ranks together.
        workers: processes that load on each rank. What they draw is drawn again by a run that
            continues; the order of the data is not.
        seed: of the order.
        **more: of StatefulDataLoader.

    Raises:
        SystemExit: the ranks would get unequal shares, or the data are less than a batch.
    """
    if len(data) < batch_size:  # type: ignore[arg-type]
        raise SystemExit(f"A batch of {batch_size} is more than the data are.")
    return StatefulDataLoader(
        data,
        share(batch_size),
        sampler=StatefulDistributedSampler(data, shuffle=True, seed=seed, drop_last=True),
        num_workers=workers,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),  # else it draws from that of dropout
        **more,
    )


def stream(data: IterableDataset[Any], batch_size: int, workers: int) -> StatefulDataLoader:
    """Loads this rank's share of each step's batch from a stream, which it splits by itself.

    Args:
        data: a stream with a state.
        batch_size: of a step, on all ranks together.
        workers: processes that load on each rank.
    """
    generator = torch.Generator()  # else it draws from that of dropout
    return StatefulDataLoader(data, share(batch_size), num_workers=workers, generator=generator)
