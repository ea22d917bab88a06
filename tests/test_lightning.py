"""Lightning trains as a plain loop does, averages weights, and resumes as if it had not stopped."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import exfusion_param as exf
from exfusion_param import cli
from exfusion_param.history import read_history
from exfusion_param.integrations.lightning import ExFusionCallback
from exfusion_testing.models import FFNs, inputs, loss_of

VARIANTS = ["sw", "dw", "mb"]
EPOCHS, STEPS, MICRO_BATCHES, SIZE = 2, 3, 2, 4  # steps of an epoch

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated"),
]


class Module(lightning.LightningModule):
    """Any model in Lightning."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = exf.wrap(FFNs().double(), variant=variant, seed=0, bank_init="uniform")

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return loss_of(self.model, batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(exf.param_groups(self, 0.1), lr=0.02)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 6)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def data() -> Tensor:
    return inputs(batch=STEPS * MICRO_BATCHES * SIZE)


def run(
    variant: str, folder: Path, *callbacks: Any, resume: Path | None = None, log_every: int = 2
) -> Module:
    module = Module(variant)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accumulate_grad_batches=MICRO_BATCHES, gradient_clip_val=0.1,
        log_every_n_steps=log_every, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, logger=CSVLogger(folder / "logs", flush_logs_every_n_steps=1),
        callbacks=[
            ExFusionCallback(),
            ModelCheckpoint(
                folder / "checkpoints", "{step}", save_on_train_epoch_end=True, save_top_k=-1
            ),
            *callbacks,
        ],
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(data()), SIZE), ckpt_path=resume)
    return module


def train_by_hand(module: Module, average: AveragedModel | None = None) -> None:
    (optimizer,), (schedule,) = module.configure_optimizers()
    micro_batches = iter(EPOCHS * data().split(SIZE))
    for _ in range(EPOCHS * STEPS):
        for _ in range(MICRO_BATCHES):
            (loss_of(module.model, next(micro_batches)) / MICRO_BATCHES).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        schedule["scheduler"].step()
        if average is not None:
            average.update_parameters(module)


def assert_same_state(ours: Module, theirs: torch.nn.Module, tolerance: float = 0) -> None:
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_trains_as_a_plain_loop_does_and_resumes(variant: str, tmp_path: Path) -> None:
    whole, by_hand = run(variant, tmp_path / "whole"), Module(variant)
    train_by_hand(by_hand)
    assert_same_state(whole, by_hand, 1e-10)
    resumed = run(
        variant, tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoints" / "step=3.ckpt"
    )
    assert_same_state(resumed, whole)


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_average_of_the_weights_is_torchs_and_fuses(variant: str, tmp_path: Path) -> None:
    averaged, by_hand = run(variant, tmp_path, EMAWeightAveraging(decay=0.5)), Module(variant)
    average = AveragedModel(by_hand, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    train_by_hand(by_hand, average)
    assert_same_state(averaged, average.module, 1e-10)
    x = inputs(seed=9)
    averaged.eval()
    before = averaged.model(x)
    assert torch.equal(exf.fuse(averaged).model(x), before)


def test_a_checkpoint_fuses_on_the_command_line(tmp_path: Path) -> None:
    module = run("mb", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step=6.ckpt"
    cli.main(["fuse", str(checkpoint), str(tmp_path / "dense.safetensors")])
    dense = load_file(tmp_path / "dense.safetensors")
    for name, value in exf.fuse(module).state_dict().items():
        assert torch.equal(dense.pop(name), value)
    assert not dense


def test_no_logging_at_all_is_fine(tmp_path: Path) -> None:
    run("mb", tmp_path, log_every=0)


def test_its_loggers_get_the_metrics_once_for_each_step(tmp_path: Path) -> None:
    run("mb", tmp_path)
    (path,) = tmp_path.rglob("metrics.csv")
    history = read_history(path)
    assert history["step"] == [2, 4, 6]
    assert all(mass == pytest.approx(1) for mass in history["bank_mass/model.blocks.0"])
    cli.main(["plot", str(path.parent)])
    assert (path.parent / "fusion_weights.png").exists()
