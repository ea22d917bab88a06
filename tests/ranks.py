"""Runs a test's function on several ranks, each a process of its own, with gloo."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed


def on_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(rank, *args)` returns on each rank; tensors and plain values alone."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run, (count, folder, function, args), nprocs=count)
        paths = [Path(folder, f"result-{rank}") for rank in range(count)]
        return [torch.load(path, weights_only=True) for path in paths]


def _run(rank: int, count: int, folder: str, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", count)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=count)
    try:
        torch.save(function(rank, *args), f"{folder}/result-{rank}")
    finally:
        distributed.destroy_process_group()
