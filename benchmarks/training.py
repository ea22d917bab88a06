"""Models that the benchmarks train on random data, dense, with experts, or with a peer's FFNs."""

import dataclasses
import importlib.util
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import exfusion_param as exf
from gpu_lines.vit import SIZES, plain_vit
from peers import PEERS, replace_ffns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

KINDS: dict[str, dict[str, Any]] = {
    f"{fuse_on} {variant}": {"fuse_on": fuse_on, "variant": variant}
    for fuse_on, variant in itertools.product(("step", "forward"), ("sw", "dw", "mb"))
}
KINDS["step mb, every 4th token"] = KINDS["step mb"] | {"token_stride": 4}
KINDS["step mb, AdamW"] = KINDS["step mb"]
"""What `wrap` is given. All "step" kinds but the last train with ExpertAdamW, others with AdamW."""

T5 = {
    "t5-small": {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "t5-base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "t5-large": {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
}
SOURCE, TARGET = 256, 64
"""Tokens of a T5 sample."""

Loss = Callable[[nn.Module], Tensor]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained.

    Args:
        model: a ViT of timm, for 224 pixels, or of `SIZES`, or a T5.
        batch_size: samples of a step.
        bf16: compute in bfloat16.
        compile: each block.
    """

    model: str
    batch_size: int
    bf16: bool = False
    compile: bool = False

    def new_model(self) -> nn.Module:
        """The dense model, with the same random weights each time."""
        torch.manual_seed(0)
        if self.model in T5:
            from transformers import T5Config, T5ForConditionalGeneration

            config: Any = T5[self.model] | {"use_cache": False, "decoder_start_token_id": 0}
            return T5ForConditionalGeneration(T5Config(**config))
        return new_vit(self.model)

    def new_loss(self) -> Loss:
        """The loss on a random batch."""
        if self.model in T5:
            source, target = (
                torch.randint(32_000, (self.batch_size, length), device=DEVICE)
                for length in (SOURCE, TARGET)
            )
            return lambda model: model(input_ids=source, labels=target).loss
        size = SIZES.get(self.model, {}).get("size", 224)
        images = torch.randn(self.batch_size, 3, size, size, device=DEVICE)
        labels = torch.randint(1000, (self.batch_size,), device=DEVICE)
        return lambda model: F.cross_entropy(model(images), labels)


def new_vit(name: str) -> nn.Module:
    """A ViT of timm; without timm one of torch.nn of the same shape."""
    if name in ("toy", "demo") or importlib.util.find_spec("timm") is None:
        return plain_vit(name)
    import timm

    return timm.create_model(name)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a ViT or a T5."""
    lists = {"blocks", "encoder.block", "decoder.block"}
    named = model.named_modules()
    return [block for name, module in named if name in lists for block in module.children()]


class Trainer:
    """A model and its optimizer.

    Args:
        task: what is trained.
        kind: "dense", or of `KINDS` or `PEERS`.
        num_experts: N.
    """

    def __init__(self, task: Task, kind: str = "dense", num_experts: int = 1) -> None:
        self.task, self.kind, self.num_experts = task, kind, num_experts
        self.model = task.new_model().to(DEVICE)  # before its experts, which are drawn there
        if kind in PEERS:
            replace_ffns(self.model, PEERS[kind], num_experts)
        elif kind != "dense":
            exf.wrap(self.model, num_experts=num_experts, bank_init="uniform", **KINDS[kind])
        self.model.to(DEVICE).train()
        for block in blocks_of(self.model) if task.compile else ():
            block.compile()
        groups = exf.param_groups(self.model, 0.05)
        has_fast_path = kind.startswith("step") and not kind.endswith("AdamW")
        self.optimizer = (
            exf.ExpertAdamW(groups, lr=1e-4)
            if has_fast_path
            else torch.optim.AdamW(groups, lr=1e-4, fused=True)
        )

    def step(self, loss: Loss) -> float:
        """Train on a batch; seconds."""
        start = synchronized_time()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.task.bf16):
            value = loss(self.model)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return synchronized_time() - start


def synchronized_time() -> float:
    """Seconds, when the GPU has done what it was told."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
