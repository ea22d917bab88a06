"""Full disks, and batches and gradients that are not finite, in the midst of a run."""

from __future__ import annotations

import random
import resource
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from exfusion_param.checkpoint import CheckpointError
from exfusion_param.fusion.lookup import groups_of
from fault_files import run_in, same

STEPS = 4
"""Of each run, with a checkpoint after every one."""


class Run:
    """A small run whose batches depend only on the step."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.model, self.optimizer, self.checkpoints = run_in(folder, seed)

    def backward(self, step: int, fault: float | None = None) -> None:
        """Of the batch of a step, all of it `fault` if that is given."""
        x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(step))
        self.model(x if fault is None else torch.full_like(x, fault)).square().mean().backward()

    def step(self) -> None:
        """The optimizer's."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def finish(self, start: int) -> dict[str, Tensor]:
        """The state after the last step."""
        for step in range(start, STEPS):
            self.backward(step)
            self.step()
        return dict(self.model.state_dict())


def fill_disks(times: int, seed: int) -> tuple[int, int, float, int]:
    """Let no file grow beyond some size during a save, and go on afterwards.

    Returns:
        How often, how often the run ended as an undisturbed one, steps lost, and wrong results.
    """
    draw = random.Random(seed)
    survived, lost = 0, 0
    with tempfile.TemporaryDirectory() as parent:
        expected = Run(Path(parent, "calm")).finish(0)
        for i in range(times):
            folder = Path(parent, str(i))
            run, at = Run(folder), draw.randrange(STEPS)
            for step in range(STEPS):
                run.backward(step)
                run.step()
                if step == at:
                    _save_on_full_disk(run, step + 1, draw.randrange(1, 30_000))
                else:
                    run.checkpoints.save(step + 1)
            again = Run(folder, seed=1)
            start = again.checkpoints.resume()
            is_right = start >= STEPS - 1 and same(again.finish(start), expected)
            survived, lost = survived + is_right, lost + STEPS - start
    return times, survived, round(lost / times, 1), times - survived


def _save_on_full_disk(run: Run, step: int, size: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        run.checkpoints.save(step)
    except CheckpointError:
        pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def poison(times: int, seed: int) -> tuple[int, int, float, int]:
    """Give a run a batch, or gradients, of NaN or inf, and resume it.

    Returns:
        How often, how often the step raised, moved no bank, and the resumed run ended as an
        undisturbed one; steps lost; and wrong results.
    """
    draw = random.Random(seed)
    survived, lost = 0, 0
    with tempfile.TemporaryDirectory() as parent:
        expected = Run(Path(parent, "calm")).finish(0)
        for i in range(times):
            run, at = Run(Path(parent, str(i))), draw.randrange(1, STEPS)
            for step in range(at):
                run.backward(step)
                run.step()
            run.checkpoints.save(at)
            is_right = _raises(run, at, draw)
            again = Run(Path(parent, str(i)), seed=1)
            start = again.checkpoints.resume()
            lost += at - start
            survived += is_right and same(again.finish(start), expected)
    return times, survived, round(lost / times, 1), times - survived


def _raises(run: Run, step: int, draw: random.Random) -> bool:
    """Whether a poisoned step is found and leaves the banks as they were."""
    fault = draw.choice([float("nan"), float("inf")])
    banks = [weights.get_buffer("bank").clone() for weights in groups_of(run.model)]
    if draw.random() < 0.5:
        run.backward(step, fault)
    else:
        run.backward(step)
        _poison_gradients(run.model, fault)
    try:
        run.step()
    except RuntimeError as error:
        now = [weights.get_buffer("bank") for weights in groups_of(run.model)]
        return "NaN or inf" in str(error) and all(map(torch.equal, now, banks))
    return False


def _poison_gradients(model: nn.Module, fault: float) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(fault)
