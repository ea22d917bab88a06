"""accelerate trains as a plain loop does, and resumes from save_state as if it had not stopped."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import exfusion_param as exf
from exfusion_param.checkpoint import fuse_checkpoint, save_config
from exfusion_testing.models import FFNs, inputs, loss_of

VARIANTS = ["sw", "dw", "mb"]
STEPS, MICRO_BATCHES, SIZE = 6, 2, 4


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def build(variant: str) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = exf.wrap(FFNs().double(), variant=variant, seed=0, bank_init="uniform")
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.1), lr=0.02)
    return model, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, STEPS)


def data() -> Tensor:
    return inputs(batch=STEPS * MICRO_BATCHES * SIZE)


def train(variant: str, folder: Path, resume_at: int = 0, **kwargs: Any) -> nn.Module:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES, **kwargs)
    loader = DataLoader(TensorDataset(data()), SIZE)
    model, optimizer, scheduler, loader = accelerator.prepare(*build(variant), loader)
    if resume_at:
        accelerator.load_state(folder / f"step-{resume_at}")
        loader = accelerator.skip_first_batches(loader, resume_at * MICRO_BATCHES)
    step = resume_at
    for (x,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, x))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            if not resume_at:
                accelerator.save_state(folder / f"step-{step}")
    return accelerator.unwrap_model(model)


def train_by_hand(variant: str) -> nn.Module:
    model, optimizer, scheduler = build(variant)
    micro_batches = iter(data().split(SIZE))
    for _ in range(STEPS):
        for _ in range(MICRO_BATCHES):
            (loss_of(model, next(micro_batches)) / MICRO_BATCHES).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model


def assert_same_state(ours: nn.Module, theirs: nn.Module, tolerance: float = 0) -> None:
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_trains_as_a_plain_loop_does_and_resumes(variant: str, tmp_path: Path) -> None:
    whole = train(variant, tmp_path)
    assert_same_state(whole, train_by_hand(variant), 1e-10)
    assert_same_state(train(variant, tmp_path, resume_at=3), whole)


def test_a_saved_state_fuses(tmp_path: Path) -> None:
    model = train("mb", tmp_path)
    save_config(model, tmp_path / "step-6")
    path = fuse_checkpoint(tmp_path / "step-6", tmp_path / "dense")
    dense = FFNs().double()
    dense.load_state_dict(load_file(path), strict=True)
    assert_same_state(dense, exf.fuse(model))


def test_mixed_precision_follows_full(tmp_path: Path) -> None:
    full = train("mb", tmp_path / "full")
    AcceleratorState._reset_state(reset_partial_state=True)
    low = train("mb", tmp_path / "low", mixed_precision="bf16")
    x = inputs(seed=9)
    torch.testing.assert_close(low.eval()(x).double(), full.eval()(x), rtol=0.05, atol=0.05)
