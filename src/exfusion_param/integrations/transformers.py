"""transformers' Trainer: weight decay, logs and checkpoints for wrapped models.

    class ExFusionTrainer(ExFusionTrainerMixin, Trainer): ...

    exf.wrap(model)
    trainer = ExFusionTrainer(model, arguments, callbacks=[ExFusionCallback()], ...)
    trainer.train()
    exf.fuse(model).save_pretrained("dense")

A plain `Trainer` trains a wrapped model as well; see what each class adds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..checkpoint import save_config
from ..fusion.lookup import wrapped_linears
from ..history import append_row, drop_rows_after, set_aside
from ..measures import metrics
from ..optim import learned_fusion_weights

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class ExFusionTrainerMixin(_Trainer):
    """A mixin that adapts Trainer to wrapped models; list it before `Trainer` among the bases.

    - Learned fusion weights do not decay. Trainer's rule for biases and norms would miss them. (It
      does cover stacked biases, which keep "bias" in their names.)
    - `metrics(model)` is logged with each training loss, until the model is fused.
    - Checkpoints of a wrapped model are saved under the model's own parameter names. transformers
      saves some models, such as ViT, under the names of older versions, which neither
      `resume_from_checkpoint` nor `exfusion fuse` finds in the model.
    """

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Trainer's own names without those of learned fusion weights."""
        learned = learned_fusion_weights(model)
        exempt = {name for name, parameter in model.named_parameters() if id(parameter) in learned}
        return [name for name in super().get_decay_parameter_names(model) if name not in exempt]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what the experts do beside the training loss."""
        if "loss" in logs and self.model is not None and wrapped_linears(self.model):
            logs = logs | metrics(self.model)
        super().log(logs, *args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save under the model's own names as long as it is wrapped, and say how to fuse it."""
        model: Any = self.model
        if not isinstance(model, nn.Module) or not wrapped_linears(model):
            super().save_model(*args, **kwargs)
            return
        with _own_names(model):
            super().save_model(*args, **kwargs)
        if self.args.should_save:
            given = args[0] if args else kwargs.get("output_dir")
            save_config(model, str(given or self.args.output_dir))


@contextmanager
def _own_names(model: Any) -> Iterator[None]:
    """Within, `save_pretrained` keeps the model's names; Trainer passes no argument on to it."""
    if not isinstance(model, PreTrainedModel):
        yield
        return
    before = dict(vars(model))
    vars(model)["save_pretrained"] = functools.partial(
        model.save_pretrained, save_original_format=False
    )
    try:
        yield
    finally:
        del vars(model)["save_pretrained"]
        if "save_pretrained" in before:
            vars(model)["save_pretrained"] = before["save_pretrained"]


class ExFusionCallback(TrainerCallback):
    """A callback that prepares a run's files for the command line.

    - Each log adds a row to `metrics.csv` in the output folder, for `exfusion plot`. A resumed run
      continues the file.
    - config.json in each checkpoint records which linears share fusion weights, for
      `exfusion fuse`.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the rows that a resumed run will write again; set another run's file aside."""
        path = Path(str(args.output_dir), "metrics.csv")
        if not state.is_world_process_zero or not path.exists():
            return
        if state.global_step > 0:
            drop_rows_after(path, state.global_step)
        else:
            set_aside(path)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Add a row to metrics.csv."""
        logs, model = given.get("logs") or {}, given.get("model")
        if "loss" not in logs:
            return
        values = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
        is_measured = any(name.startswith("fusion_weights/") for name in values)
        if model is not None and not is_measured and wrapped_linears(model):
            values |= metrics(model)  # on all ranks, which may have to call it together
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        append_row(folder / "metrics.csv", {"step": state.global_step} | values)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Describe the checkpoint that was just written."""
        folder = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        model = given.get("model")
        is_here = state.is_world_process_zero and folder.is_dir()
        if is_here and model is not None and wrapped_linears(model):
            save_config(model, folder)
