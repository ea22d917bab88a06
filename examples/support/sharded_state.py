"""Checkpoints that every rank writes and reads its part of, in a folder that all nodes share."""

import os
import shutil
from pathlib import Path
from typing import Any

from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from support import ranks


class TrainState(Stateful):
    """All that a run needs to continue; it begins where the latest checkpoint was written.

    Args:
        model: sharded over any number of ranks.
        optimizer: of its parameters.
        scheduler: of the optimizer.
        folder: of the checkpoints.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, folder: Path
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.folder, self.step = folder, 0
        latest = folder / "latest"
        if latest.exists():
            load({"train": self}, checkpoint_id=folder / latest.read_text())

    def state_dict(self) -> dict[str, Any]:
        """This rank's parts."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        parts = {"model": model, "optimizer": optimizer}
        return parts | {"scheduler": self.scheduler.state_dict(), "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )
        self.scheduler.load_state_dict(state_dict["scheduler"])
        self.step = state_dict["step"]

    def save(self) -> None:
        """Write a checkpoint beside the last one, name it the latest, remove the others.

        A run that is killed meanwhile continues after the last one.
        """
        name = f"step-{self.step}"
        save({"train": self}, checkpoint_id=self.folder / name)
        distributed.barrier()  # every rank has written its part
        if ranks.is_first():
            partial = self.folder / "latest.partial"
            with open(partial, "w") as file:
                file.write(name)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.folder / "latest")
            for other in self.folder.glob("step-*"):
                if other.name != name:
                    shutil.rmtree(other)
