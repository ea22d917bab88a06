"""Time and peak memory of `exfusion fuse` on a large checkpoint.

Command: `python benchmarks/fuse_checkpoint.py --gib 2`.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_param.checkpoint import save_config

NUM_EXPERTS = 8


@dataclasses.dataclass
class Settings:
    """Fuse a large checkpoint on the command line.

    Args:
        gib: size of the wrapped checkpoint.
        dim: width of the model; an FFN has two stacks of 8 x 4 dim x dim.
        dtype: of the weights.
    """

    gib: float = 2.0
    dim: int = 1024
    dtype: str = "float32"


def build(settings: Settings) -> nn.Module:
    """A dense model whose wrapped checkpoint has about the size asked for."""
    dtype = getattr(torch, settings.dtype)
    stack_bytes = NUM_EXPERTS * 4 * settings.dim**2 * dtype.itemsize
    depth = max(1, round(settings.gib * 2**30 / (2 * stack_bytes)))
    layers = [
        nn.Sequential(
            nn.Linear(settings.dim, 4 * settings.dim),
            nn.GELU(),
            nn.Linear(4 * settings.dim, settings.dim),
        )
        for _ in range(depth)
    ]
    return nn.Sequential(*layers).to(dtype)


def write_checkpoint(folder: Path, settings: Settings) -> None:
    """The wrapped checkpoint, as a training script writes it."""
    model = exf.wrap(build(settings), num_experts=NUM_EXPERTS, bank_init="uniform", seed=0)
    save_config(model, folder)
    save_file(model.state_dict(), folder / "model.safetensors")


MEASURE = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - start
print(seconds, 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def measured(*command: str | Path) -> tuple[float, int]:
    """Seconds that a command takes, and bytes that it has in memory at most."""
    arguments = [sys.executable, "-c", MEASURE, *map(str, command)]
    result = subprocess.run(arguments, check=True, capture_output=True, text=True)
    seconds, peak = result.stdout.split()
    return float(seconds), int(peak)


def main(settings: Settings) -> None:
    """Write, fuse, load strictly, and print what it took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = Settings(gib=0, dim=8)
        for sub, chosen in (("small", small), ("large", settings)):
            (folder / sub).mkdir()
            # In a process of its own: this one's memory would count as its children's.
            arguments = [sys.executable, __file__, "write", str(folder / sub)]
            subprocess.run([*arguments, json.dumps(vars(chosen))], check=True)
        exfusion = Path(sys.executable).parent / "exfusion"
        _, base = measured(exfusion, "fuse", folder / "small", folder / "small-dense")
        seconds, peak = measured(exfusion, "fuse", folder / "large", folder / "large-dense")
        dense: dict[str, Tensor] = {}
        for file in (folder / "large-dense").glob("*.safetensors"):
            dense |= load_file(file)
        build(settings).load_state_dict(dense, strict=True)
        size = os.path.getsize(folder / "large" / "model.safetensors")
    dtype = getattr(torch, settings.dtype)
    print(
        f"checkpoint {size / 2**30:.2f} GiB, largest stack "
        f"{NUM_EXPERTS * 4 * settings.dim**2 * dtype.itemsize / 2**20:.0f} MiB, output "
        f"{sum(tensor.nbytes for tensor in dense.values()) / 2**20:.0f} MiB: {seconds:.1f} s, "
        f"peak memory {(peak - base) / 2**20:.0f} MiB above the {base / 2**20:.0f} MiB "
        "that the command takes for a checkpoint of a few KiB; the output loads strictly"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]:
        write_checkpoint(Path(sys.argv[2]), Settings(**json.loads(sys.argv[3])))
    else:
        main(tyro.cli(Settings))
