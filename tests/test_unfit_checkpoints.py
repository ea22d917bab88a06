"""A checkpoint that cannot be fused on disk is refused, and leaves nothing."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import exfusion_param as exf
from exfusion_param import cli
from exfusion_param.checkpoint import CheckpointError, fuse_checkpoint
from exfusion_testing.models import FFNs
from exfusion_testing.wrapped_checkpoints import save, save_shards, save_torch, trained


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["exfusion"])
    path.write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size * 2 // 3)


STACK = "blocks.0.fc2.parametrizations.weight.original"
BANK = "blocks.0.fc1.parametrizations.weight.0.fusion_weights.bank"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a truncated file": (
        lambda folder: truncate(folder / "model.safetensors"),
        "model.safetensors is damaged or of another format: ",
    ),
    "an empty file": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        "model.safetensors is damaged or of another format: ",
    ),
    "no file": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "holds no checkpoint: none of model.safetensors, ",
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        'its config.json is missing or has no "exfusion". Write it with ',
    ),
    "a config without the entry": (
        lambda folder: (folder / "config.json").write_text("{}"),
        'its config.json is missing or has no "exfusion"',
    ),
    "a config that is not JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json is not JSON: Expecting property name",
    ),
    "a malformed entry": (
        lambda folder: change_config(folder, lambda entry: entry.pop("wraps")),
        "config.json is malformed: 'wraps'",
    ),
    "a later version": (
        lambda folder: change_config(folder, lambda entry: entry.update(version=2)),
        "has version 2, this package knows 1. Update exfusion_param.",
    ),
    "a wrong N": (
        lambda folder: change_config(
            folder, lambda entry: entry["wraps"][0]["config"].update(num_experts=3)
        ),
        r"bank has shape \(4,\), config.json says 3 experts",
    ),
    "a stack of a wrong N": (
        lambda folder: change_tensors(folder, lambda t: t.update({STACK: t[STACK][:3].clone()})),
        r"fc2.parametrizations.weight.original has shape \(3, 4, 6\), config.json says 4 experts",
    ),
    "another variant": (
        lambda folder: change_config(
            folder, lambda entry: entry["wraps"][0]["config"].update(variant="dw")
        ),
        "no fusion weights for 'blocks.0': blocks.0.fc1.*weights is missing. Its config.json says",
    ),
    "an unknown key": (
        lambda folder: change_tensors(folder, lambda t: t.update({"extra.weight": torch.ones(2)})),
        "holds extra.weight, which the model of its config.json lacks",
    ),
    "an unknown stack": (
        lambda folder: change_tensors(
            folder, lambda t: t.update({"stem.parametrizations.weight.original": torch.ones(4, 2)})
        ),
        "holds stem.parametrizations.weight.original, which",
    ),
    "a missing key": (
        lambda folder: change_tensors(folder, lambda t: (t.pop("head.bias"), t.pop(STACK))),
        f"lacks {STACK}, head.bias",
    ),
    "stacks of integers": (
        lambda folder: change_tensors(folder, lambda t: t.update({STACK: t[STACK].long()})),
        "fc2.parametrizations.weight.original is torch.int64, not a trained dtype",
    ),
    "a stack without a shape": (
        lambda folder: change_tensors(folder, lambda t: t.update({STACK: torch.ones(4)})),
        r"original has shape \(4,\), config.json says 4 experts",
    ),
    "a fused key that is not listed": (
        lambda folder: change_config(folder, lambda entry: entry["keys"].remove("stem.weight")),
        "holds stem.weight, which the model of its config.json lacks",
    ),
    "a stack that is not listed": (
        lambda folder: change_config(
            folder, lambda entry: entry["keys"].remove("blocks.0.fc2.weight")
        ),
        "malformed: blocks.0.fc2.weight is not among its keys",
    ),
    "a group without linears": (
        lambda folder: change_config(
            folder, lambda entry: entry["wraps"][0]["groups"][0].update(linears={})
        ),
        "config.json is malformed: ",
    ),
    "a config nested without end": (
        lambda folder: (folder / "config.json").write_text("[" * 200_000),
        "config.json is not JSON: ",
    ),
    "NaN in an expert": (
        lambda folder: change_tensors(folder, lambda t: t[STACK][1].fill_(float("nan"))),
        "blocks.0.fc2.weight: the experts or their fusion weights hold NaN or inf",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_fused_is_one_line_and_leaves_nothing(fault: str, tmp_path: Path) -> None:
    folder = save(trained(), tmp_path / "run")
    spoil, message = FAULTS[fault]
    spoil(folder)
    before = sorted(tmp_path.rglob("*"))
    for out in (tmp_path / "dense", tmp_path / "dense.safetensors"):
        with pytest.raises(SystemExit, match=message) as stopped:
            cli.main(["fuse", str(folder), str(out)])
        assert str(stopped.value).startswith("exfusion: ")
        assert "\n" not in str(stopped.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("size", [0, 10, 500])
def test_a_damaged_torch_file_is_one_line(size: int, tmp_path: Path) -> None:
    folder = save_torch(trained(), tmp_path)
    with open(folder / "pytorch_model.bin", "r+b") as file:
        file.truncate(size)
    with pytest.raises(CheckpointError, match="pytorch_model.bin is damaged or of another format"):
        fuse_checkpoint(folder, tmp_path / "dense")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "unpickled"),)

    torch.save({"state_dict": trained().state_dict(), "hooks": Evil()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="holds more than tensors and plain values"):
        fuse_checkpoint(tmp_path / "model.pt", tmp_path / "dense")
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", 3, []])
def test_an_index_reaches_no_file_elsewhere(name: object, tmp_path: Path) -> None:
    folder = save_shards(trained(), tmp_path)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"stem.weight": name}}))
    with pytest.raises(CheckpointError, match="which is not a file beside it"):
        fuse_checkpoint(folder, tmp_path / "dense")


def test_a_small_file_cannot_ask_for_large_memory(tmp_path: Path) -> None:
    state = trained("sw").state_dict()
    state[STACK] = torch.ones(1).expand(4, 10**6, 10**6)
    torch.save({"state_dict": state}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="fc2.* is not a plain tensor with memory of its own"):
        fuse_checkpoint(tmp_path / "model.pt", tmp_path / "dense")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save_shards(trained(), tmp_path)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names model-00002-of-00003.safetensors, which"):
        fuse_checkpoint(folder, tmp_path / "dense")


def test_what_is_there_already_is_not_overwritten(tmp_path: Path) -> None:
    folder = save(trained(), tmp_path / "run")
    for out in (folder, folder / "model.safetensors"):
        with pytest.raises(ValueError, match="already exists. Choose another name"):
            fuse_checkpoint(folder, out)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("link", "dense.pt"):
        with pytest.raises(ValueError, match="already exists|must be a folder or a file"):
            fuse_checkpoint(folder, tmp_path / name)
    assert fuse_checkpoint(folder, tmp_path / "empty").exists()


def test_a_bank_of_zeros_warns(tmp_path: Path) -> None:
    folder = save(exf.wrap(FFNs()), tmp_path)
    with pytest.warns(UserWarning, match="fusion_weights.bank: the fusion weights are all zero"):
        fuse_checkpoint(folder, tmp_path / "dense")
