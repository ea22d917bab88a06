"""A small Llama, and how torchtitan spreads one over ranks, for torchtitan_llama.py."""

import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor import parallel as styles
from torch.nn import functional as F

WORDS, HEAD = 64, 16


def rotated(x: Tensor) -> Tensor:
    """Rotary positions of (batch, heads, tokens, HEAD)."""
    rates = 1e4 ** -torch.linspace(0, 1, HEAD // 2, device=x.device)
    angles = torch.arange(x.shape[2], device=x.device)[:, None] * rates
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class Attention(nn.Module):
    """Causal attention, of all heads or of those that a rank has."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to the same."""
        linears = (self.wq, self.wk, self.wv)
        q, k, v = (wx(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for wx in linears)
        y = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        return self.wo(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(dim, 4 * dim, bias=False) for _ in range(2))
        self.w2 = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to the same."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """A Transformer block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(dim), FeedForward(dim)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to the same."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """A Llama, or a pipeline's stage of one, which lacks the other stages' parts."""

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.tok_embeddings: Any = nn.Embedding(WORDS, dim)
        self.layers = nn.ModuleDict({str(i): Block(dim) for i in range(layers)})
        self.norm: Any = nn.RMSNorm(dim)
        self.output: Any = nn.Linear(dim, WORDS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens) to (batch, tokens, WORDS), or from or to features between stages."""
        x = self.tok_embeddings(x) if self.tok_embeddings is not None else x
        for layer in self.layers.values():
            x = layer(x)
        return self.output(self.norm(x)) if self.output is not None else x

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw each weight by its name, whole, so that it is the same under any layout."""
        weight: Any  # a DTensor
        for name, weight in self.named_parameters():
            if "fusion_weights" in name:  # ExFusion: to_empty has started them
                continue
            name = name.replace("_checkpoint_wrapped_module.", "")
            draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            value = torch.ones(weight.shape)
            if value.ndim > 1:
                nn.init.trunc_normal_(value, std=0.02, generator=draw)
            mesh, places = weight.device_mesh, weight.placements
            weight.copy_(
                distribute_tensor(value.to(weight.device), mesh, places, src_data_rank=None)
            )


def parallelize(model: Llama, mesh: DeviceMesh) -> None:
    """TP with sequences split between the linears, activation checkpointing, FSDP2, in this order.

    torchtitan compiles each block after activation checkpointing and before FSDP2.
    """
    column, row = styles.ColwiseParallel, styles.RowwiseParallel
    tokens, every = Shard(1), Replicate()
    gather: dict[str, Any] = {"input_layouts": (tokens,), "desired_input_layouts": (every,)}
    ends = {
        "tok_embeddings": row(input_layouts=every, output_layouts=tokens),
        "norm": styles.SequenceParallel(),
        "output": column(input_layouts=tokens, output_layouts=every),
    }
    plan = {
        "attention_norm": styles.SequenceParallel(),
        "attention": styles.PrepareModuleInput(**gather),
        **{f"attention.w{name}": column() for name in "qkv"},
        "attention.wo": row(output_layouts=tokens),
        "ffn_norm": styles.SequenceParallel(),
        "feed_forward": styles.PrepareModuleInput(**gather),
        "feed_forward.w1": column(),
        "feed_forward.w3": column(),
        "feed_forward.w2": row(output_layouts=tokens),
    }
    if mesh["tp"].size() > 1:
        own = {name: style for name, style in ends.items() if getattr(model, name) is not None}
        styles.parallelize_module(model, mesh["tp"], own)
        for layer in model.layers.values():
            styles.parallelize_module(layer, mesh["tp"], plan)
    for name, layer in model.layers.items():
        model.layers[name] = checkpoint_wrapper(layer)
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
