"""Step time and memory under FSDP2: ExFusion against dense with the same settings.

Command: `torchrun --standalone --nproc-per-node 1 benchmarks/fsdp_step.py --model vit-b`, on CUDA
with NCCL where there is a GPU; `--model decoder-1b` takes 80 GB, `--model tiny` a CPU.
"""

import dataclasses
import gc
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any, Literal

import timm
import torch
import tyro
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import exfusion_param as exf
from exfusion_param.sharding.transformer_blocks import transformer_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
Step = Callable[[nn.Module], Tensor]


@dataclasses.dataclass
class Settings:
    """Train for a few steps, dense and with experts, in turns.

    Args:
        model: what to train.
        num_experts: of each linear.
        variant: of ExFusion.
        batch_size: on each rank.
        steps: timed in each round, after as many that are not.
        rounds: of each model; the figures are medians over them.
        compile: each block.
        kinds: which to compare with the first one.
    """

    model: Literal["tiny", "vit-b", "decoder-1b"] = "tiny"
    num_experts: int = 4
    variant: Literal["sw", "dw", "mb"] = "mb"
    batch_size: int = 8
    steps: int = 10
    rounds: int = 3
    compile: bool = False
    kinds: tuple[str, ...] = ("dense", "step", "forward")


def vit(name: str, settings: Settings) -> tuple[nn.Module, Step]:
    """A ViT of timm for 224 pixels, and its loss on random images."""
    images = torch.randn(settings.batch_size, 3, 224, 224, device=DEVICE)
    labels = torch.randint(1000, (settings.batch_size,), device=DEVICE)
    return timm.create_model(name), lambda model: F.cross_entropy(model(images), labels)


def decoder(settings: Settings) -> tuple[nn.Module, Step]:
    """A Llama of 1.2 billion parameters, and its loss on random tokens."""
    config = LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    tokens = torch.randint(config.vocab_size, (settings.batch_size, 1024), device=DEVICE)
    return LlamaForCausalLM(config), lambda model: model(input_ids=tokens, labels=tokens).loss


def build(settings: Settings, kind: str) -> tuple[nn.Module, Step]:
    """The sharded model of one kind, and its loss."""
    torch.manual_seed(0)
    if settings.model == "decoder-1b":
        model, loss = decoder(settings)
    else:
        names = {"tiny": "vit_tiny_patch16_224", "vit-b": "vit_base_patch16_224"}
        model, loss = vit(names[settings.model], settings)
    mesh = init_device_mesh(DEVICE, (distributed.get_world_size(),))
    policy = POLICY if DEVICE == "cuda" else MixedPrecisionPolicy()
    wrapped: Any = exf.wrap(model, num_experts=settings.num_experts, variant=settings.variant,
                            bank_init="uniform", fuse_on="forward" if kind == "dense" else kind,
                            )  # fmt: skip
    blocks = transformer_blocks(wrapped)
    if kind == "dense":
        exf.fuse(model)
        for block in (*blocks, model):
            torch_fully_shard(block, mesh=mesh, mp_policy=policy)
    else:
        exf.fully_shard(model, mesh=mesh, blocks=blocks, mp_policy=policy)
    for block in blocks if settings.compile else []:
        block.compile()
    return model, loss


def measure(settings: Settings, kind: str) -> tuple[float, float]:
    """Seconds for a step, and the peak memory of the GPU in bytes."""
    model, loss = build(settings, kind)
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.05), lr=1e-4, fused=True)
    times = []
    for index in range(2 * settings.steps):
        if index == settings.steps and DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    return median(times[settings.steps :]), peak


def main(settings: Settings) -> None:
    """Measure in turns, print the medians."""
    distributed.init_process_group()
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    results: dict[str, list[tuple[float, float]]] = {kind: [] for kind in settings.kinds}
    for _ in range(settings.rounds):
        for kind in settings.kinds:
            results[kind].append(measure(settings, kind))
            gc.collect()
    first = results[settings.kinds[0]]
    for kind, measured in results.items() if distributed.get_rank() == 0 else ():
        ratios = [ours[0] / theirs[0] for ours, theirs in zip(measured, first, strict=True)]
        seconds, peak = (median(values) for values in zip(*measured, strict=True))
        ratio = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        memory = f"  peak {peak / 2**30:.2f} GiB" if DEVICE == "cuda" else ""
        print(f"{kind:8} step {1000 * seconds:8.1f} ms  ratio {ratio}{memory}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Settings))
