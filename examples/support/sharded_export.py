"""The dense model out of a sharded one, and a look at it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.utils.data import TensorDataset

import exfusion_param as exf
from support import ranks


def export(model: nn.Module, folder: Path) -> Path:
    """Write the fused weights as one safetensors file; no rank ever holds the whole model."""
    if ranks.is_first():  # parts by another number of ranks may lie there
        shutil.rmtree(folder, ignore_errors=True)
    distributed.barrier()
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True, enable_consolidation=True)
    save(exf.fused_state_dict(model), storage_writer=writer)
    distributed.barrier()
    if ranks.is_first():
        shutil.rmtree(folder / "sharded")  # the parts that the file was made of
    (path,) = folder.glob("*.safetensors")
    return path


@torch.no_grad()
def check(
    path: Path, build: Callable[[], nn.Module], model: nn.Module, images: TensorDataset
) -> None:
    """Load the dense model on the first rank, as any other, and test it.

    Args:
        path: of its weights.
        build: makes a new dense model.
        model: the sharded model, whose logits are to be the same.
        images: to test on, and their labels.
    """
    device = next(model.parameters()).device
    x, y = (tensor.to(device) for tensor in images.tensors)
    expected = model.eval()(x[:64])  # on all ranks together
    if not ranks.is_first():
        return
    dense = build().to(device).eval()
    dense.load_state_dict(load_file(path), strict=True)
    logits = torch.cat([dense(part) for part in x.split(64)])
    accuracy = 100 * (logits.argmax(1) == y).float().mean().item()
    difference = (logits[:64] - expected).abs().max().item()
    print(f"test accuracy of the dense model {accuracy:.1f} %, ", end="")
    print(f"its logits and the sharded model's differ by {difference:.0e} at most")
