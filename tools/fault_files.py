"""Checkpoints that were damaged, and files that strangers have made up."""

from __future__ import annotations

import json
import random
import resource
import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

import exfusion_param as exf
from exfusion_param.checkpoint import CheckpointError, Checkpoints, fuse_checkpoint, save_config
from exfusion_param.checkpoint.files.manifest import write_manifest
from exfusion_param.checkpoint.files.processes import Processes

SPARE_BYTES = 2**28
"""How much more memory all files together may take than none."""


def build(seed: int = 0) -> nn.Module:
    """A small wrapped model."""
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    return exf.wrap(model, bank_init="uniform")


def run_in(folder: Path, seed: int = 0) -> tuple[nn.Module, Optimizer, Checkpoints]:
    """The model, its optimizer, and their checkpoints."""
    model = build(seed)
    optimizer = exf.ExpertAdamW(exf.param_groups(model, 0.1), lr=0.01)
    return model, optimizer, Checkpoints(folder, {"model": model, "optimizer": optimizer})


def corrupt_checkpoints(times: int, seed: int) -> tuple[int, int, float, int]:
    """Damage the latest of two checkpoints, and resume.

    Returns:
        How often, how often the run went on from one of them, the checkpoints lost for each time,
        and how often it went on from something else.
    """
    draw = random.Random(seed)
    survived, lost, wrong = 0, 0, 0
    with tempfile.TemporaryDirectory() as parent:
        saved, states = Path(parent, "saved"), {}
        model, _, checkpoints = run_in(saved)
        for step in (1, 2):
            model(torch.randn(2, 3, 16)).sum().backward()
            checkpoints.save(step)
            states[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            nn.init.normal_(next(model.parameters()))
        for _ in range(times):
            folder = Path(parent, "copy")
            shutil.copytree(saved, folder)
            files = sorted(path for path in (folder / "step-00000002").rglob("*") if path.is_file())
            damage(draw.choice(files), draw)
            model, _, checkpoints = run_in(folder, seed=1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                step = checkpoints.resume()
            is_right = same(model.state_dict(), states[step])
            survived, wrong = survived + is_right, wrong + (not is_right)
            lost += 2 - step
            shutil.rmtree(folder)
    return times, survived, round(lost / times, 1), wrong


def damage(path: Path, draw: random.Random) -> None:
    """Flip bits, cut, lengthen, overwrite or delete a file."""
    content = bytearray(path.read_bytes())
    how = draw.choice(["flip", "cut", "lengthen", "zeros", "delete"])
    at = draw.randrange(len(content))
    if how == "flip":
        for _ in range(draw.choice([1, 10])):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del content[at:]
    elif how == "lengthen":
        content += draw.randbytes(draw.randrange(1, 100))
    elif how == "zeros":  # as after a crash of the machine
        content[at:] = bytes(len(content) - at)
    path.write_bytes(content) if how != "delete" else path.unlink()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states are equal bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fuzz_files(times: int, seed: int) -> tuple[int, int, float, int]:
    """Open files that are made up: wrapped checkpoints, indices, and checkpoints of runs.

    Returns:
        How many, how many were refused by a clear error or read, 0, and how many did anything else:
        another exception, or more memory than a file of that size can need.
    """
    draw = random.Random(seed)
    survived, wrong = 0, 0
    with tempfile.TemporaryDirectory() as parent:
        good = Path(parent, "good")
        _make_good(good)
        targets = (fuzz_wrapped, fuzz_index, fuzz_run)
        for target in targets:  # what libraries take once
            _try(target, good, Path(parent, "bad"), random.Random(seed))
        before = _peak()
        for i in range(times):
            answer = _try(targets[i % len(targets)], good, Path(parent, "bad"), draw)
            survived, wrong = survived + answer, wrong + (not answer)
        wrong += _peak() - before > SPARE_BYTES
    return times, survived, 0.0, wrong


def _try(target: Callable[..., None], good: Path, bad: Path, draw: random.Random) -> bool:
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(good, bad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target(bad, draw)
        except CheckpointError:
            return True
        except ValueError as error:  # NaN in experts, say
            return bool(str(error))
        except Exception as error:
            print(f"{target.__name__}: {error!r}")
            return False
    return True


def _make_good(folder: Path) -> None:
    """A wrapped checkpoint in one file, one in shards, and a run."""
    model, _, checkpoints = run_in(folder / "run")
    model(torch.randn(2, 3, 16)).sum().backward()
    checkpoints.save(1)
    state = model.state_dict()
    (folder / "one").mkdir()
    (folder / "shards").mkdir()
    save_file(state, folder / "one/model.safetensors")
    names = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(state)}
    for file in set(names.values()):
        part = {name: tensor for name, tensor in state.items() if names[name] == file}
        save_file(part, folder / "shards" / file)
    index = {"metadata": {}, "weight_map": names}
    (folder / "shards/model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("one", "shards"):
        save_config(model, folder / name)


def fuzz_wrapped(folder: Path, draw: random.Random) -> None:
    """Change the header of a safetensors file, or the description beside it, and fuse it."""
    if draw.random() < 0.5:
        _change_json(folder / "one/config.json", draw)
    else:
        _change_header(folder / "one/model.safetensors", draw)
    fuse_checkpoint(folder / "one", folder / "dense")


def fuzz_index(folder: Path, draw: random.Random) -> None:
    """Change the index of shards, and fuse them."""
    _change_json(folder / "shards/model.safetensors.index.json", draw)
    fuse_checkpoint(folder / "shards", folder / "dense")


def fuzz_run(folder: Path, draw: random.Random) -> None:
    """Change a file of a run's checkpoint, with checksums that fit, and resume."""
    checkpoint = folder / "run/step-00000001"
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    path = draw.choice(files)
    if path.suffix == ".json":
        _change_json(path, draw)
    else:
        _change_header(path, draw)
    if path.name != "manifest.json" and path.exists():
        sealed(checkpoint)
    run_in(folder / "run", seed=1)[2].resume()


def sealed(checkpoint: Path) -> None:
    """Make the manifest list the files as they are, as whoever changes them on purpose can."""
    content = json.loads((checkpoint / "manifest.json").read_text())
    kept = {key: value for key, value in content.items() if key not in ("files", "sha256")}
    write_manifest(checkpoint, kept, Processes())


def _change_header(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, rest = content[8 : 8 + size], content[8 + size :]
    how = draw.choice(["json", "bytes", "size", "cut"])
    if how == "json":
        header = json.dumps(_changed(json.loads(header), draw)).encode()
        header += b" " * (-len(header) % 8)
        size = len(header)
    elif how == "bytes":
        changed = bytearray(header)
        for _ in range(draw.randrange(1, 4)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        header = bytes(changed)
    elif how == "size":
        size = draw.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])
    content = struct.pack("<Q", size) + header + rest
    path.write_bytes(content[: draw.randrange(len(content))] if how == "cut" else content)


def _change_json(path: Path, draw: random.Random) -> None:
    text = path.read_text()
    how = draw.choice(["value", "value", "value", "bytes", "cut", "deep"])
    if how == "value":
        text = json.dumps(_changed(json.loads(text), draw))
    elif how == "bytes":
        at = draw.randrange(len(text))
        text = text[:at] + chr(draw.randrange(1, 1000)) + text[at + 1 :]
    elif how == "cut":
        text = text[: draw.randrange(len(text))]
    else:
        text = "[" * 100_000
    path.write_text(text)


STRANGE: list[Any] = [
    None, True, -1, 0, 1, 3, 10**6, 2**40, 2**63, 10**30, 1.5, float("nan"), "", "model", "../x",
    "/etc/passwd", "a" * 10_000, "F64", "I8", "step", "no_method", [], [1], [0, 4], [2**40, 2**40],
    [-1, 8], {}, {"a": 1}, {"__is__": "tensor", "value": "x"}, {"__is__": "dtype", "value": "load"},
    {"__is__": "quantized", "value": {"class": "os.system", "inner": {}, "context": []}},
]  # fmt: skip


def _changed(value: Any, draw: random.Random) -> Any:
    """A JSON value with another value, a key more or a key less somewhere in it."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        how = draw.random()
        if how < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if how < 0.2:
            return value | {str(draw.choice(STRANGE)): draw.choice(list(value.values()))}
        return value | {key: _changed(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], _changed(value[at], draw), *value[at + 1 :]]
    return draw.choice(STRANGE)


def _peak() -> int:
    """The most memory that this process has taken, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on Linux
