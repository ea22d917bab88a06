"""One seed of an arm, trained by the package as any script would; several share the GPU."""

import time
from pathlib import Path
from threading import Barrier
from typing import Any

import torch
from torch import Tensor

import exfusion_param as exf
from gpu_lines.arms import Shape, prepare
from gpu_lines.batches import Batch, Batches, Images, accuracy
from support.methods import Method


class Alone:
    """An arm in training with one seed."""

    def __init__(self, arm: str, seed: int, shape: Shape, device: str) -> None:
        self.method: Method = prepare(arm, seed, shape, device)
        self.shape, self.device = shape, device
        groups = exf.param_groups(self.method.model, shape.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, fused=device == "cuda")
        torch.manual_seed(seed)  # of what the method draws

    def step(self, batch: Batch, rate: float) -> Tensor:
        """Train on a batch of one seed; the loss, (1,)."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        model = self.method.model
        with torch.autocast(self.device, torch.bfloat16, enabled=self.shape.bf16):
            logits = model(batch.images[0], batch.keep[0]).float()
        loss = -(batch.targets[0] * logits.log_softmax(-1)).sum(-1).mean()
        if self.method.extra_loss is not None:
            loss = loss + self.method.extra_loss(model)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.method.after_step is not None:
            self.method.after_step(model)
        return loss.detach()[None]


def timed_steps(
    arm: str, shape: Shape, device: str, folder: Path, steps: int, ready: Barrier, seed: int
) -> float:
    """Seconds of a step, after as many that are not timed; runs in a process of its own.

    The timed steps begin when all processes are ready, as one by itself would be faster.
    """
    images = Images.load(folder, shape, device)
    batches, run = Batches(images, shape, (seed,)), Alone(arm, seed, shape, device)
    started = 0.0
    for step in range(2 * steps):
        if step == steps:
            ready.wait()
            started = now(device)
        run.step(batches.batch(step % batches.steps), shape.lr)
    return (now(device) - started) / steps


def train(
    arm: str, shape: Shape, device: str, folder: Path, until: float, seed: int
) -> dict[str, Any] | None:
    """A whole run, or None if the time is over; runs in a process of its own."""
    images = Images.load(folder, shape, device)
    batches, run = Batches(images, shape, (seed,)), Alone(arm, seed, shape, device)
    started, loss = now(device), torch.zeros(1)
    for step in range(batches.steps):
        if time.time() > until:
            return None
        loss = run.step(batches.batch(step), shape.rate(step, batches.steps))
    seconds = now(device) - started
    shipped = run.method.ship(run.method.model)
    return {"accuracy": accuracy(shipped, images), "loss": loss.item(), "seconds": seconds}


def now(device: str) -> float:
    """Seconds, when the GPU has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
