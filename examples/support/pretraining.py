"""The training loop of the recipes: it logs, evaluates, saves, stops on request and resumes."""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
from tqdm import tqdm

from exfusion_param.checkpoint import Checkpoints, StopRequest
from support import ranks
from support.log import RunLog
from support.methods import Method
from support.settings import remember

Batch = Sequence[Any]
"""Tensors or lists of one entry for each sample, as long as one another."""
RECENT = 200  # steps whose median is the time of one
LOG_EVERY = 50  # steps


class History:
    """What a run has measured so far, a part of its checkpoints."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []  # of each evaluation
        self.seconds = 0.0  # of training, with the loading of data, without evaluations
        self.recent: list[float] = []  # seconds of the last steps

    def count(self, seconds: float) -> None:
        """Count a step."""
        self.seconds += seconds
        self.recent = [*self.recent[-RECENT:], seconds]

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return vars(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        vars(self).update(state)


def moved(value: Any, device: torch.device) -> Any:
    """Tensors in lists and dicts on a device."""
    move = lambda tensor: tensor.to(device, non_blocking=True)  # noqa: E731
    return tree_map_only(Tensor, move, value)


def micro_batches(batch: Batch, size: int | None) -> list[Batch]:
    """A batch in parts of this many samples; None leaves it whole."""
    count = len(batch[0])
    size = size or count
    return [[entries[i : i + size] for entries in batch] for i in range(0, count, size)]


def plain(settings: Any) -> dict[str, Any]:
    """The fields of a recipe's settings as JSON has them."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))


def start(out: Path, settings: Any, seed: int | None) -> int:
    """Remember the settings of a new run, and seed what all ranks draw alike; the seed."""
    if ranks.is_first():
        remember(out, plain(settings))
    distributed.barrier()
    torch.manual_seed(seed or 0)
    return seed or 0


@dataclasses.dataclass
class Pretraining:
    """A run of a recipe, on one process or on all of torchrun's.

    Args:
        out: the folder for checkpoints, logs and results.
        method: the model in training, on this rank's device.
        optimizer: of its parameters.
        loader: of this rank's share of each step's batch.
        loss: of the model and a micro-batch, a mean over its samples.
        schedule: sets the learning rates before the step of this number.
        evaluate: measures the model; called by all ranks together, in eval mode.
        steps: of the whole run.
        evaluate_every: steps between evaluations.
        save_every: steps between checkpoints.
        micro_batch: samples that go through the model at once; None takes the whole share.
        average: an average of the weights, such as timm's ModelEmaV3.
        clip: largest norm of the gradients; None does not clip.
        amp: forward under autocast to bfloat16.
        more: parts that checkpoints take along, such as a scheduler.
    """

    out: Path
    method: Method
    optimizer: torch.optim.Optimizer
    loader: StatefulDataLoader
    loss: Callable[[nn.Module, Batch], Tensor]
    schedule: Callable[[int], object]
    evaluate: Callable[[nn.Module], dict[str, float]]
    steps: int
    evaluate_every: int
    save_every: int
    micro_batch: int | None = None
    average: Any = None
    clip: float | None = None
    amp: bool = False
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def train(self) -> bool:
        """Train, from the last checkpoint on; whether the end was reached, and not a stop."""
        self.history, self.model = History(), self.method.model
        self.losses: list[Tensor] = []  # since the last row of the log
        parts = {"model": self.model, "optimizer": self.optimizer, "loader": self.loader}
        parts |= {"history": self.history, **self.more}
        if self.average is not None:
            parts["average"] = self.average.module
        checkpoints = Checkpoints(self.out / "checkpoints", parts, keep=2)
        stop, step = StopRequest(), checkpoints.resume()
        self.log = RunLog(self.out, after=step) if ranks.is_first() else None
        self.whole = self.model
        if distributed.get_world_size() > 1:
            self.whole = DistributedDataParallel(self.model)
        bar = tqdm(total=self.steps, initial=step, disable=not ranks.is_first(), mininterval=1)
        clock = time.perf_counter()
        while step < self.steps:
            if isinstance(self.loader.sampler, StatefulDistributedSampler):
                self.loader.sampler.set_epoch(step // len(self.loader))
            for batch in self.loader:
                self.train_step(step, batch)
                step += 1
                self.history.count(time.perf_counter() - clock)
                bar.update()
                is_stopped, is_last = stop.received(), step == self.steps
                if is_last or step % self.evaluate_every == 0:
                    bar.set_postfix(self.measure(step))
                elif step % LOG_EVERY == 0:
                    self.write(step, {})
                if is_stopped or is_last or step % self.save_every == 0:
                    checkpoints.save(step)
                if is_last:
                    break
                if is_stopped:
                    ranks.say(f"Stopped after step {step}. The same command continues.")
                    return False
                clock = time.perf_counter()
        return True

    def train_step(self, step: int, batch: Batch) -> None:
        """One step of the optimizer."""
        self.schedule(step)
        device = next(self.model.parameters()).device
        parts = micro_batches(moved(batch, device), self.micro_batch)
        for number, part in enumerate(parts, start=1):
            share = len(part[0]) / len(batch[0])
            with self.reducing(number == len(parts)):
                with torch.autocast(device.type, torch.bfloat16, enabled=self.amp):
                    loss = self.loss(self.whole, part)
                    if self.method.extra_loss is not None:
                        loss = loss + self.method.extra_loss(self.model)
                (share * loss).backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.method.after_step is not None:
            self.method.after_step(self.model)
        if self.average is not None:
            self.average.update(self.model)
        self.losses.append(loss.detach())

    def reducing(self, is_last: bool) -> AbstractContextManager[Any]:
        """Leave the gradients of all micro-batches but the last where they are."""
        if is_last or not isinstance(self.whole, DistributedDataParallel):
            return nullcontext()
        return self.whole.no_sync()

    def measure(self, step: int) -> dict[str, float]:
        """Evaluate, log, and remember."""
        tested = self.model if self.average is None else self.average.module
        was_training = tested.training
        with torch.no_grad():
            values = self.evaluate(tested.eval())
        tested.train(was_training)
        self.history.rows.append({"step": step} | values)
        self.write(step, values | self.method.metrics(self.model))
        return values

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log a row, with the mean loss since the last one."""
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        loss = torch.stack(self.losses).mean().item()
        row = {"loss": loss, "lr": lr, "seconds": self.history.seconds}
        self.losses.clear()
        if self.log is not None:
            self.log.row(step, row | values)

    def finish(self, settings: Any, **more: float | None) -> nn.Module:
        """Write `results.json`, with more figures, and `model.safetensors`; the shipped model."""
        results = {
            "settings": plain(settings),
            "rows": self.history.rows,
            "seconds": round(self.history.seconds, 2),
            "step_ms": round(1000 * statistics.median(self.history.recent), 2),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            **more,
        }
        trained = self.model if self.average is None else self.average.module
        shipped = self.method.ship(trained)
        if ranks.is_first():
            save_model(shipped, str(self.out / "model.safetensors"))
            (self.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        distributed.barrier()
        return shipped
