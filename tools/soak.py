"""A long run of a tiny model with everything on, and what it leaves behind."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel

import exfusion_param as exf
from exfusion_param.checkpoint import Checkpoints
from exfusion_param.history import append_row
from exfusion_param.routing import record_routing, router_load


class Usage(NamedTuple):
    """What the process holds.

    Args:
        mebibytes: of memory.
        handles: open files and sockets.
        threads: of the process.
        files: on disk.
        tensors: alive.
    """

    mebibytes: float
    handles: int
    threads: int
    files: int
    tensors: int


def usage(folder: Path) -> Usage:
    """What the process holds now."""
    gc.collect()
    process = psutil.Process()
    return Usage(
        round(process.memory_info().rss / 2**20, 1),
        process.num_fds(),
        process.num_threads(),
        sum(path.is_file() for path in folder.rglob("*")),
        sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()),
    )


def soak(steps: int, save_every: int = 200) -> list[Usage]:
    """Train with accumulation, clipping, an average, metrics, routing records and checkpoints.

    Args:
        steps: of the optimizer.
        save_every: steps between two checkpoints, and between two rows of metrics.

    Returns:
        What the process held after a tenth of the steps, and at the end.
    """
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    exf.wrap(model, fuse_on="step", bank_init="uniform")
    optimizer = exf.ExpertAdamW(exf.param_groups(model, 0.05), lr=1e-3)
    scheduler = CosineAnnealingLR(optimizer, steps)
    average = AveragedModel(model)
    held = []
    with tempfile.TemporaryDirectory() as folder:
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "ema": average}
        checkpoints = Checkpoints(folder, parts, asynchronous=True)
        for step in range(1, steps + 1):
            for _ in range(2):
                x = torch.randn(2, 4, 16)
                (F.mse_loss(model(x), x) / 2).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            average.update_parameters(model)
            if step % save_every == 0:
                with record_routing(model) as shares, torch.no_grad():
                    model(x)
                row = {"step": step} | exf.metrics(model)
                append_row(Path(folder, "metrics.csv"), row | router_load(shares, torch.zeros(2)))
                checkpoints.save(step)
            if step in (steps // 10, steps):
                checkpoints.wait()
                held.append(usage(Path(folder)))
    return held
