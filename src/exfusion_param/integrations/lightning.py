"""Lightning: logs and checkpoints for wrapped models.

    class Module(lightning.LightningModule):
        def __init__(self):
            ...
            exf.wrap(self.model)

    trainer = lightning.Trainer(callbacks=[ExFusionCallback()], ...)

Wrap before `configure_optimizers` is called. `exfusion fuse` loads a checkpoint only if its saved
hyperparameters are plain values: save `config.to_dict()` instead of an ExFusionConfig.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..checkpoint import describe
from ..expert_config import ENTRY
from ..fusion.lookup import wrapped_linears
from ..measures import metrics


class ExFusionCallback(Callback):
    """A callback that logs `metrics(model)` and prepares checkpoints for `exfusion fuse`.

    - Every `log_every_n_steps` steps, the metrics go to all loggers of the Trainer. The folder of a
      CSVLogger then holds a metrics.csv for `exfusion plot`.
    - Each checkpoint records which linears share fusion weights, so that
      `exfusion fuse last.ckpt OUT` needs nothing else.
    """

    def __init__(self) -> None:
        self._logged_at = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start over."""
        self._logged_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Log, once for each step of the optimizer."""
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every == 0 or step % every != 0 or step == self._logged_at:
            return
        self._logged_at = step
        if wrapped_linears(pl_module):
            values = metrics(pl_module)  # on all ranks; loggers read one
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the description."""
        if wrapped_linears(pl_module):
            checkpoint[ENTRY] = describe(pl_module)
