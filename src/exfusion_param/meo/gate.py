"""The gate of one linear, or of one FFN: fusion weights that choose among experts.

As all fusion weights it belongs to the parametrization of its first linear. At the task level it
gives one vector, and the linears fuse with it as under ExFusion. At the sequence and token levels
each sample has gates of its own, and the linear's `forward` merges for them (gated_forward.py).

Storage: `gate`, the W_g of the gating, and `noise`, its W_noise, both (N, D) and zero at the start;
`blocks`, one for each linear, at the token level.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..finding.discovery import FFNGroup
from ..finding.place import PlaceInGroup
from ..finding.projections import projections_of
from ..fusion_weights.token_pool import TokenPool
from ..fusion_weights.votes.custom_ops import current_backward
from ..tensors.expert_starts import uniform_weights
from ..tensors.precision import without_autocast
from ..tensors.shards import assign
from .config import MEOConfig
from .gated_forward import gated_by_sample, per_sample_weight
from .gating import Gates, noisy_top_k, softmax_gates
from .model_forwards import ModelForwards


class Gate(TokenPool):
    """Chooses k of N experts."""

    config: MEOConfig
    drawn = "gate"
    task: Tensor | None
    forwards: ModelForwards
    pools_in_eval = True
    takes_single_samples = False  # without a batch dimension, shape (T, D)

    def __init__(self, group: FFNGroup, config: MEOConfig, seed: int, *, is_causal: bool) -> None:
        super().__init__(group, config, seed)
        self.is_causal = is_causal  # tokens must not see later ones
        self.recorded: tuple[Gates, ...] = ()  # in the running forward of the model
        self.mean_gates: Tensor | None = None  # of the last forward in training
        features = [projection.in_features for projection in projections_of(self.linears)]
        shape = (config.num_experts, config.task_dim or features[0])
        self.gate = nn.Parameter(self.new_tensor(*shape))
        if config.gating == "noisy_top_k":
            self.noise = nn.Parameter(self.new_tensor(*shape))
        if config.level == "token":
            device, dtype = self.gate.device, self.gate.dtype
            self.blocks = nn.ModuleList(TokenBlock(d, device, dtype) for d in features)
        self.register_buffer("task", None, persistent=False)
        self.reset_parameters(self.generator(self.gate.device))

    @property
    def batch_dim(self) -> int:
        """The dimension of an input that runs over samples."""
        given = self.config.batch_dim
        return int(self.layout.tokens_first) if given is None else given

    def __getstate__(self) -> dict[str, Any]:
        """The state that a deepcopy includes, without the running forward."""
        return super().__getstate__() | {"recorded": (), "mean_gates": None}

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Zero the gate and its noise, and draw the token blocks."""
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)
        for block in self.modules():
            if isinstance(block, TokenBlock):
                block.reset_parameters(generator)

    def forward(self) -> Tensor:
        """The gates of the whole batch, shape (N,); outside of a forward without noise.

        Raises:
            RuntimeError: each sample has its own, or no task is set.
        """
        if self.config.level != "task":
            raise RuntimeError(
                f"Each sample has its own gates in {self.group!r}, so there is no single fused "
                'weight. Only a model that is wrapped with level="task" has one, for each task.'
            )
        return self.choose_for_task().gates[0] if self.current is None else self.current

    def reported(self) -> Tensor:
        """The mean gates of the last step in training, shape (N,); 1/N before the first."""
        if self.config.level == "task" and self.task is not None:
            return self.choose_for_task().gates[0]
        if self.mean_gates is not None:
            return self.mean_gates
        return self.start()

    def start(self) -> Tensor:
        """1/N, shape (N,)."""
        gate = self.gate
        return uniform_weights(self.config.num_experts, gate.device, gate.dtype)

    def fuse_stack(self, experts: Tensor) -> Tensor:
        """The fused tensor at the task level; what stands for it at the others, shape (*S)."""
        if self.config.level != "task":
            return per_sample_weight(experts)
        return super().fuse_stack(experts)

    def require_fusable(self) -> None:
        """Raise a ValueError unless there is one dense model to fuse to."""
        if self.config.level != "task":
            raise ValueError(
                f'level="{self.config.level}" has a weight for each sample, so no dense model '
                'computes the same. Train with level="task" to fuse, or ship the wrapped model.'
            )
        if self.task is None:
            raise ValueError("No task is set. Call meo.fuse(model, task=...).")

    def run(
        self, linear: nn.Module, x: Tensor, place: PlaceInGroup, run_dense: Callable[[], Any]
    ) -> Any:
        """Merge for each sample, or run the dense forward on what is fused under one gate."""
        if self.config.level != "task":
            return gated_by_sample(linear, self, place, x)
        if place.is_first or self.current is None:
            chosen = self.choose_for_task(is_noisy=self.training)
            self.record(chosen)
            self.current = chosen.gates[0]
        return run_dense()

    def choose_for_task(self, is_noisy: bool = False) -> Gates:
        """The gates for the task that is set, as for one sample."""
        if self.task is None:
            raise RuntimeError('level="task" needs a task. Call meo.set_task(model, task) first.')
        return self.choose(self.task.unsqueeze(0), is_noisy)

    def choose(self, pooled: Tensor, is_noisy: bool) -> Gates:
        """The gates for what was pooled of each sample, shape (B, D)."""
        if self.gate.is_meta and not pooled.is_meta:
            raise RuntimeError(
                f"The gate of {self.group!r} is on the meta device. accelerate's offloading loads "
                "what a module has when it is called, and linears read gates and experts without a "
                "call. Take it off, accelerate.hooks.remove_hook_from_module(model, recurse=True), "
                "or offload the dense model of meo.fuse(model, task=...)."
            )
        with without_autocast(pooled.device):
            pooled = pooled.to(torch.promote_types(pooled.dtype, torch.float32))
            if self.config.gating == "softmax":
                normalised = F.layer_norm(pooled, pooled.shape[-1:])
                return softmax_gates(normalised @ self.gate.to(pooled.dtype).mT)
            logits = pooled @ self.gate.to(pooled.dtype).mT
            deviation = F.softplus(pooled @ self.noise.to(pooled.dtype).mT) if is_noisy else None
            return noisy_top_k(logits, self.config.kept, deviation)

    def record(self, gates: Gates) -> None:
        """Keep the gate's outputs in training, for `balance_loss` and `metrics`."""
        # Activation checkpointing runs the forward again in the backward.
        is_counted = self.training and torch.is_grad_enabled()
        if is_counted and (torch.compiler.is_compiling() or current_backward() is None):
            self.forwards.record(self)
            self.remember("recorded", (*self.recorded, gates))

    def forget(self) -> None:
        """A new forward of the model begins, or an optimizer has stepped."""
        if self.recorded:
            with torch.no_grad():
                total = torch.stack([gates.importance for gates in self.recorded]).sum(dim=0)
                self.mean_gates = total / total.sum()
            self.recorded = ()

    def optimizer_stepped(self, skipped: Tensor | None) -> None:
        """Forget the recorded gates: their graph is not needed again."""
        self.forget()


REDUCTION = 64
"""How much narrower than its input the block is."""


class TokenBlock(nn.Module):
    """The residual block of each token at the token level: `x + W_up relu(W_down x)`.

    That is x at the start, as W_up is zero.
    """

    def __init__(self, features: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        width = max(1, features // REDUCTION)
        self.down = nn.Parameter(torch.empty(width, features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(features, width, device=device, dtype=dtype))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw W_down as `nn.Linear` does, and set W_up to zero."""
        down = torch.empty(self.down.shape, dtype=self.down.dtype, device=self.down.device)
        bound = 1 / math.sqrt(down.shape[1])
        assign(self.down, nn.init.uniform_(down, -bound, bound, generator=generator))
        nn.init.zeros_(self.up)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., D) to the same shape."""
        hidden = F.linear(x, self.down.to(x.dtype)).relu()
        return x + F.linear(hidden, self.up.to(x.dtype)).to(x.dtype)
