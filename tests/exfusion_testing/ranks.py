"""Runs a test's function on several ranks: processes with gloo, or threads, which start at once."""

import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

from exfusion_testing.processes import FORKS


def on_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(rank, *args)` returns on each rank; only tensors and plain values."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _run,
            (count, folder, dict(os.environ), function, args),
            nprocs=count,
            start_method=FORKS,
        )
        paths = [Path(folder, f"result-{rank}") for rank in range(count)]
        return [torch.load(path, weights_only=True) for path in paths]


def _run(
    rank: int,
    count: int,
    folder: str,
    variables: dict[str, str],
    function: Callable[..., Any],
    args: Any,
) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", count)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=count)
    try:
        torch.save(function(rank, *args), f"{folder}/result-{rank}")
        distributed.barrier()  # a rank that leaves early would take its connections along
    finally:
        distributed.destroy_process_group()


def on_threads(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(rank, *args)` returns on each rank, a thread of this process.

    Threads share torch's random generator: draw before, or with a generator of each rank's own.
    """
    if torch.__version__ < "2.12":
        pytest.skip("torch 2.11 crashes where a thread makes a DTensor")
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    _install_threaded_pg()
    store = distributed.HashStore()
    try:
        with ThreadPoolExecutor(count) as pool:
            futures = [
                pool.submit(_thread, rank, count, store, function, args) for rank in range(count)
            ]
        faults = [fault for future in futures if (fault := future.exception()) is not None]
        if faults:  # a rank that waited for another one exits with SystemExit
            raise next((f for f in faults if not isinstance(f, SystemExit)), faults[0])
        return [future.result() for future in futures]
    finally:
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)


def _thread(
    rank: int, count: int, store: Any, function: Callable[..., Any], args: Sequence[Any]
) -> Any:
    distributed.init_process_group("threaded", rank=rank, world_size=count, store=store)
    try:
        return function(rank, *args)
    except BaseException as fault:
        ProcessLocalGroup.exception_handle(fault)  # frees the others, which wait for this rank
        raise
    finally:
        distributed.destroy_process_group()
