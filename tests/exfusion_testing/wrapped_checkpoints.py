"""Wrapped checkpoints on disk, in each form that is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import exfusion_param as exf
from exfusion_param import checkpoint
from exfusion_param.checkpoint import save_config
from exfusion_testing.models import FFNs, inputs, loss_of

Save = Callable[[nn.Module, Path], Path]


def trained(variant: str = "mb", **kwargs: Any) -> nn.Module:
    """A model after three steps."""
    model = exf.wrap(FFNs(), variant=variant, seed=0, **kwargs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for seed in range(3):
        loss_of(model, inputs(seed=seed).float()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def save(model: nn.Module, folder: Path) -> Path:
    """A model.safetensors, and its config.json."""
    save_config(model, folder)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def save_torch(model: nn.Module, folder: Path) -> Path:
    """A pytorch_model.bin."""
    save_config(model, folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def save_nested(model: nn.Module, folder: Path) -> Path:
    """As trainers do, in one file that needs no config.json."""
    path = folder / "last.ckpt"
    state = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "exfusion": checkpoint.describe(model)}, path)
    return path


def save_shards(model: nn.Module, folder: Path) -> Path:
    """Three files of safetensors and their index."""
    save_config(model, folder)
    state = model.state_dict()
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    where = {name: files[i % 3] for i, name in enumerate(state)}
    for file in files:
        save_file({name: state[name] for name in state if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def save_torch_shards(model: nn.Module, folder: Path) -> Path:
    """Two files of torch and their index."""
    save_config(model, folder)
    state = model.state_dict()
    where = {name: f"pytorch_model-{len(name) % 2}.bin" for name in state}
    for file in set(where.values()):
        torch.save({name: state[name] for name in state if where[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    return folder
