"""How long `wrap`, `fuse` and a dense export take, against the size of the model.

Command: `python benchmarks/wrap_and_fuse.py`. The model of 6.7 billion parameters is on the meta
device, where a wrap allocates nothing. For checkpoints on disk see fuse_checkpoint.py.
"""

import dataclasses
import functools
import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
import tyro
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import exfusion_param as exf
from exfusion_param.fusion.lookup import groups_of
from tables import markdown_table, write_results


@dataclasses.dataclass
class Settings:
    """Time the verbs.

    Args:
        models: of timm.
        num_experts: N.
        rounds: the figures are medians over them.
        folder: where the tables go.
    """

    models: tuple[str, ...] = (
        "deit_tiny_patch16_224",
        "deit_small_patch16_224",
        "deit_base_patch16_224",
        "vit_large_patch16_224",
    )
    num_experts: int = 4
    rounds: int = 3
    folder: Path = Path(__file__).parent / "results"


@dataclasses.dataclass
class Row:
    """One model.

    Args:
        model: its name.
        million_numbers_in_stacks: what `wrap` draws.
        wrap_ms: independent experts.
        wrap_ns_per_number: the same for each number in the stacks.
        upcycle_ms: wrap with upcycled experts.
        fuse_ms: in place.
        export_ms: `fused_state_dict`, and safetensors to disk.
    """

    model: str
    million_numbers_in_stacks: float
    wrap_ms: float
    wrap_ns_per_number: float
    upcycle_ms: float
    fuse_ms: float
    export_ms: float


def milliseconds(action: Callable[[], object]) -> float:
    """The time that something takes."""
    start = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - start)


def export(model: nn.Module) -> None:
    """The dense weights to a file."""
    with tempfile.TemporaryDirectory() as folder:
        save_file(dict(exf.fused_state_dict(model)), Path(folder) / "model.safetensors")


def measure(settings: Settings, name: str, make: Callable[[], nn.Module]) -> Row:
    """Wrap, export and fuse new models."""
    times: list[list[float]] = []
    fields: dict[str, Any] = {"num_experts": settings.num_experts, "seed": 0}
    numbers = 0
    for _ in range(settings.rounds):
        upcycled, model = make(), make()
        is_meta = next(model.parameters()).is_meta
        wrap_it = functools.partial(exf.wrap, bank_init="uniform", **fields)
        upcycle = milliseconds(functools.partial(wrap_it, upcycled, expert_init="upcycle"))
        del upcycled
        gc.collect()  # modules and parametrizations refer to each other
        wrap = milliseconds(functools.partial(wrap_it, model))
        stacks = [stack for weights in groups_of(model) for stack in weights.expert_stacks()]
        numbers = sum(stack.numel() for stack in stacks)
        exported = 0.0 if is_meta else milliseconds(functools.partial(export, model))
        fused = milliseconds(functools.partial(exf.fuse, model))
        times.append([wrap, upcycle, fused, exported])
        del model, stacks
        gc.collect()
    wrap, upcycle, fused, exported = (median(column) for column in zip(*times, strict=True))
    return Row(
        name,
        million_numbers_in_stacks=round(numbers / 1e6, 1),
        wrap_ms=round(wrap, 1),
        wrap_ns_per_number=round(1e6 * wrap / numbers, 2),
        upcycle_ms=round(upcycle, 1),
        fuse_ms=round(fused, 1),
        export_ms=round(exported, 1),
    )


def llama() -> nn.Module:
    """Llama 2 with 6.7 billion parameters, without memory."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig())


def main(settings: Settings) -> None:
    """Measure, print and write the tables."""
    makes: dict[str, Callable[[], nn.Module]] = {}
    makes |= {name: functools.partial(timm.create_model, name) for name in settings.models}
    makes["Llama 2 7B, meta device"] = llama
    rows = [measure(settings, name, make) for name, make in makes.items()]
    note = (
        f"N = {settings.num_experts}, float32, medians of {settings.rounds}. "
        "Command: `python benchmarks/wrap_and_fuse.py`."
    )
    write_results(settings.folder, "wrap_and_fuse", "Time to wrap, fuse and export", note, rows)
    print(markdown_table(rows))


if __name__ == "__main__":
    main(tyro.cli(Settings))
