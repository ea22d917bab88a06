"""Train several models side by side, on the same batches, in a loop that can stop at any step."""

import itertools
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from tqdm import tqdm

import exfusion_param as exf
from exfusion_param.checkpoint import Checkpoints, StopRequest
from support.data import Data, Images
from support.settings import remember

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOG_EVERY = 10  # steps


class Run:
    """One model in training, as any script would train it."""

    def __init__(
        self, model: nn.Module, lr: float, weight_decay: float, steps: int, **more: Any
    ) -> None:
        self.model = model.to(DEVICE)
        self.optimizer = exf.ExpertAdamW(exf.param_groups(model, weight_decay), **more)
        self.scheduler = OneCycleLR(self.optimizer, lr, total_steps=steps, cycle_momentum=False)

    def step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Train on one batch; its loss, and the time that it took."""
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return {"loss": loss.item(), "step_ms": 1000 * (time.perf_counter() - start)}

    @torch.no_grad()
    def logits(self, images: Images) -> tuple[Tensor, Tensor]:
        """The model's logits for the images, and their labels."""
        self.model.eval()
        batches = [(self.model(x.to(DEVICE)).cpu(), y) for x, y in DataLoader(images, 500)]
        self.model.train()
        logits, labels = zip(*batches, strict=True)
        return torch.cat(logits), torch.cat(labels)

    def is_right(self, images: Images) -> Tensor:
        """Whether the model classifies each of the images rightly."""
        logits, labels = self.logits(images)
        return logits.argmax(1) == labels

    def accuracy(self, images: Images) -> float:
        """Share of the images that are classified rightly, in percent."""
        return 100 * self.is_right(images).float().mean().item()


class Comparison:
    """Several runs in training side by side, on the same batches.

    Args:
        models: the models by the names of their runs; one is called "exfusion".
        data: the images.
        out: the folder of the run.
        settings: plain values that must be the same for a run to continue; among them `epochs`,
            `batch_size`, `lr`, `weight_decay`, `save_every` and `seed`.
        optimizers: more settings of the optimizer of some runs.
    """

    def __init__(
        self,
        models: dict[str, nn.Module],
        data: Data,
        out: Path,
        settings: dict[str, Any],
        optimizers: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    ) -> None:
        self.data, self.settings = data, settings
        self.steps_per_epoch = len(data.train) // settings["batch_size"]
        self.total_steps = settings["epochs"] * self.steps_per_epoch
        recipe = (settings["lr"], settings["weight_decay"], self.total_steps)
        self.runs = {
            name: Run(model, *recipe, **optimizers.get(name, {})) for name, model in models.items()
        }
        self.step = 0
        self.rows: list[dict[str, float]] = []  # of metrics.csv
        remember(out, settings)
        parts = {
            f"{name.replace(' ', '_')}-{key}": part  # the names of folders
            for name, run in self.runs.items()
            for key, part in vars(run).items()
        }
        self.checkpoints = Checkpoints(out / "checkpoints", parts | {"history": self}, keep=2)

    def train(self) -> None:
        """Train until the last step, from the checkpoint on if there is one."""
        self.step = self.checkpoints.resume()
        stop = StopRequest()
        with tqdm(total=self.total_steps, initial=self.step, unit="step") as bar:
            for images, labels in self.batches():
                row = self.train_step(images.to(DEVICE), labels.to(DEVICE))
                bar.update()
                bar.set_postfix_str(self.progress(row), refresh=False)
                is_stopped = stop.received()
                if is_stopped or self.step % self.settings["save_every"] == 0:
                    self.checkpoints.save(self.step)
                if is_stopped:
                    sys.exit(f"Stopped after step {self.step}. The same command continues.")
        self.checkpoints.save(self.step)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches that are left; an epoch's order depends only on the seed and its number."""
        while self.step < self.total_steps:
            epoch, done = divmod(self.step, self.steps_per_epoch)
            order = torch.Generator().manual_seed(self.settings["seed"] + epoch)
            size = self.settings["batch_size"]
            loader = DataLoader(
                self.data.train, size, shuffle=True, generator=order, drop_last=True
            )
            yield from itertools.islice(loader, done, None)

    def train_step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Train every run on one batch; log the step if it is due."""
        self.step += 1
        row: dict[str, float] = {"step": self.step}
        for name, run in self.runs.items():
            row |= {f"{key}/{name}": value for key, value in run.step(images, labels).items()}
        ends_epoch = self.step % self.steps_per_epoch == 0
        if ends_epoch:
            for name, run in self.runs.items():
                row[f"accuracy/{name}"] = run.accuracy(self.data.test)
        if ends_epoch or self.step % LOG_EVERY == 0:
            self.rows.append(row | exf.metrics(self.runs["exfusion"].model))
        return row

    def progress(self, row: dict[str, float]) -> str:
        """Loss, accuracy after the first epoch, and step time of every run in a few words."""
        return ", ".join(
            f"{name} loss {row[f'loss/{name}']:.2f} {self._accuracy(name)}"
            f"{row[f'step_ms/{name}']:.0f} ms"
            for name in self.runs
        )

    def _accuracy(self, name: str) -> str:
        accuracy = self.last_accuracy(name)
        return "" if math.isnan(accuracy) else f"acc {accuracy:.1f} % "

    def last_accuracy(self, name: str) -> float:
        """Test accuracy of a run after its last epoch, in percent; nan before the first."""
        measured = [row[key] for row in self.rows if (key := f"accuracy/{name}") in row]
        return measured[-1] if measured else float("nan")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds besides the runs."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.rows = state["rows"]
