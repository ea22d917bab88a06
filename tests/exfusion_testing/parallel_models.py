"""A small Transformer in float64 as tensor parallelism expects it, and how to parallelize it."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

import exfusion_param as exf

BATCH, TOKENS, WORDS, DIM = 8, 4, 12, 8
SEQUENCE: Any = Shard(1)
Plan = dict[str, ParallelStyle]


class Attention(nn.Module):
    """Two heads of four numbers, or as many of them as a rank has."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, DIM) to the same."""
        q, k, v = (
            linear(x).unflatten(-1, (-1, 2)).transpose(1, 2)
            for linear in (self.wq, self.wk, self.wv)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.wo(y.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """A SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(DIM, 16), nn.Linear(DIM, 16)
        self.w2 = nn.Linear(16, DIM)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, DIM) to the same."""
        out: Tensor = self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))
        return out


class TransformerBlock(nn.Module):
    """Attention and a feed-forward network, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.attention, self.feed_forward = Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, DIM) to the same."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, DIM)
        self.layers = nn.ModuleList(TransformerBlock() for _ in range(2))
        self.norm = nn.RMSNorm(DIM)
        self.head = nn.Linear(DIM, WORDS, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        """(batch, tokens) to (batch, tokens, WORDS)."""
        x = self.embed(words)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def transformer(variant: Any = "mb", fuse_on: Any = "step") -> Any:
    """A wrapped Transformer, alike on all ranks."""
    generator = torch.Generator().manual_seed(0)
    model = Transformer().double()
    with torch.no_grad():  # threads share torch's own generator
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return exf.wrap(model, variant=variant, fuse_on=fuse_on, bank_init="uniform", seed=1)


ATTENTION: Plan = {
    "attention.wq": ColwiseParallel(),
    "attention.wk": ColwiseParallel(),
    "attention.wv": ColwiseParallel(),
    "attention.wo": RowwiseParallel(),
}
FFN: Plan = {
    "feed_forward.w1": ColwiseParallel(),
    "feed_forward.w3": ColwiseParallel(),
    "feed_forward.w2": RowwiseParallel(),
}


def tensor_parallel(model: Any, mesh: DeviceMesh, part: Literal["all", "attention"] = "all") -> Any:
    """Split the blocks' linears over the ranks of a mesh."""
    for layer in model.layers:
        parallelize_module(layer, mesh, ATTENTION if part == "attention" else ATTENTION | FFN)
    return model


def sequence_and_loss_parallel(model: Any, mesh: DeviceMesh) -> Any:
    """Split all of the model as torchtitan does a Llama, the tokens between and the scores too."""
    gathered = {"input_layouts": (SEQUENCE,), "desired_input_layouts": (Replicate(),)}
    block: Plan = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(**gathered),  # type: ignore[arg-type]
        **ATTENTION,
        "attention.wo": RowwiseParallel(output_layouts=SEQUENCE),
        "ffn_norm": SequenceParallel(),
        "feed_forward": PrepareModuleInput(**gathered),  # type: ignore[arg-type]
        **FFN,
        "feed_forward.w2": RowwiseParallel(output_layouts=SEQUENCE),
    }
    parallelize_module(
        model,
        mesh,
        {
            "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=SEQUENCE),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(
                input_layouts=SEQUENCE, output_layouts=Shard(-1), use_local_output=False
            ),
        },
    )
    for layer in model.layers:
        parallelize_module(layer, mesh, block)
    return model


def words() -> list[Tensor]:
    """Four batches, shape (BATCH, TOKENS + 1)."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(WORDS, (BATCH, TOKENS + 1), generator=generator) for _ in range(4)]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, index: int = 0, parts: int = 1
) -> nn.Module:
    """A step for each batch, or for one of several equal parts of it."""
    for batch in words():
        part = batch.chunk(parts)[index]
        scores = model(part[:, :-1])
        if isinstance(scores, torch.distributed.tensor.DTensor):
            with loss_parallel():
                cross_entropy(scores, part).backward()
        else:
            cross_entropy(scores, part).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def cross_entropy(scores: Tensor, batch: Tensor) -> Tensor:
    """The mean loss of the next words."""
    return nn.functional.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())
