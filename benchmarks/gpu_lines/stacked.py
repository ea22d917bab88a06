"""Trains an arm with several seeds at once, as one model with one more dimension.

A small model leaves most of a GPU idle, whose kernels cost as much to start as to run. The state
comes from the package's models, one for each seed, and goes back to them to be tested and shipped.
In between the same equations run on stacked tensors; a test holds them to the package.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import exfusion_param as exf
from gpu_lines.arms import Shape, prepare
from gpu_lines.batches import Batch
from gpu_lines.stacked_ffns import AFTER_STEP, FFN, FFNS, FUSION, Weights, linear
from support.methods import BALANCE

_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")


def packed(state: Weights) -> Weights:
    """A model's state, in which the experts of a mixture are one tensor."""
    found: dict[str, list[Tensor]] = {}
    for name, value in state.items():
        found.setdefault(_EXPERT.sub(r"\1*\3", name), []).append(value)
    return {k: torch.stack(v) if "experts.*" in k else v[0] for k, v in found.items()}


def unpacked(state: Weights) -> Weights:
    """The state that was packed."""
    found: Weights = {}
    for name, value in state.items():
        many = enumerate(value) if "experts.*" in name else [(0, value)]
        found |= {name.replace("*", str(number)): part for number, part in many}
    return found


def block(
    x: Tensor, keep: Tensor, order: Tensor, p: Weights, heads: int, ffn: FFN
) -> tuple[Tensor, Tensor]:
    """A block of each model: (S, batch, tokens, dim) to the same, and what the FFN returns."""
    rows = _norm(x.flatten(1, 2), p["norm1.weight"], p["norm1.bias"])
    qkv = linear(rows, p["attn.qkv.weight"], p["attn.qkv.bias"])
    q, k, v = qkv.view(-1, x.shape[2], 3, heads, x.shape[3] // heads).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows.shape)
    y = linear(y, p["attn.proj.weight"], p["attn.proj.bias"]).view(x.shape)
    x = x + keep[:, 0, :, None, None] * y
    rows = _norm(x.flatten(1, 2), p["norm2.weight"], p["norm2.bias"])
    y, more = ffn(rows, p, order)
    return x + keep[:, 1, :, None, None] * y.view(x.shape), more


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * weight[:, None] + bias[:, None]


class Stacked:
    """An arm with all its seeds in training.

    Args:
        arm: of `ARMS`.
        seeds: S of them.
        shape: of the model and its training.
        device: where it is.
    """

    def __init__(self, arm: str, seeds: tuple[int, ...], shape: Shape, device: str) -> None:
        self.arm, self.shape, self.device = arm, shape, device
        self.methods = [prepare(arm, seed, shape, device) for seed in seeds]
        states = [packed(dict(method.model.state_dict())) for method in self.methods]
        self.state = {name: torch.stack([s[name] for s in states]) for name in states[0]}
        self.trained = {k: v.requires_grad_() for k, v in self.state.items() if "bank" not in k}
        names = exf.no_weight_decay_names(self.methods[0].model)
        spared = {_EXPERT.sub(r"\1*\3", name) for name in names}
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in self.trained.items() if n in spared], "weight_decay": 0.0},
            {"params": [p for n, p in self.trained.items() if n not in spared]},
        ]
        is_fast = device == "cuda"
        self.optimizer = torch.optim.AdamW(
            groups, weight_decay=shape.weight_decay, fused=is_fast, foreach=not is_fast
        )
        self.block = torch.compile(block) if shape.compile and is_fast else block

    def losses(self, batch: Batch) -> Tensor:
        """Of each model, (S,)."""
        p, shape = self.state, self.shape
        seeds, size = batch.images.shape[:2]
        patches = F.unfold(batch.images.flatten(0, 1), shape.patch, stride=shape.patch)
        rows = patches.mT.reshape(seeds, -1, shape.patch**2)
        x = linear(rows, p["patch_embed.weight"].flatten(2), p["patch_embed.bias"])
        x = x.view(seeds, size, -1, shape.dim)
        first = p["cls_token"].to(x.dtype).expand(-1, size, -1, -1)
        x = torch.cat([first, x], dim=2) + p["pos_embed"]
        uneven = []
        for number in range(shape.depth):
            prefix = f"blocks.{number}."
            own = {k[len(prefix) :]: v for k, v in p.items() if k.startswith(prefix)}
            x, more = self.block(
                x, batch.keep[:, number], batch.order, own, shape.heads, FFNS[self.arm]
            )
            if (bank := prefix + FUSION.format("bank")) in p:
                p[bank].copy_(more)
            elif more.numel():
                uneven.append(more)
        x = _norm(x[:, :, 0], p["norm.weight"], p["norm.bias"])
        logits = linear(x, p["head.weight"], p["head.bias"]).float()
        losses = -(batch.targets * logits.log_softmax(-1)).sum(-1).mean(1)
        return losses + BALANCE * torch.stack(uneven).mean(0) if uneven else losses

    def step(self, batch: Batch, rate: float) -> Tensor:
        """Train on a batch; the losses, (S,)."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device, torch.bfloat16, enabled=self.shape.bf16):
            losses = self.losses(batch)
        losses.sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.arm in AFTER_STEP:
            AFTER_STEP[self.arm](self.trained)
        return losses.detach()

    def shipped(self) -> list[nn.Module]:
        """The models as the package ships them; called once."""
        models = []
        for number, method in enumerate(self.methods):
            state = {name: value.detach()[number] for name, value in self.state.items()}
            method.model.load_state_dict(unpacked(state))
            models.append(method.ship(method.model))
        return models
