"""What torchtitan's trainer does, for torchtitan_llama.py: optimizers, states, pipelines."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional as F

import exfusion_param as exf

from .llama import WORDS, Llama

TOKENS = 16
FLAT = states.StateDictOptions(flatten_optimizer_state_dict=True)  # by name, for other layouts


class Optimizers:
    """One optimizer for each part of the model, as torchtitan's OptimizersContainer."""

    def __init__(self, parts: list[Llama], lr: float) -> None:
        self.pairs: list[tuple[Any, torch.optim.Optimizer]] = [
            (part, torch.optim.AdamW(exf.param_groups(part, 0.1), lr)) for part in parts
        ]

    def step(self) -> None:
        """Step all of them."""
        for _, optimizer in self.pairs:
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The states of all of them, by the parameters' names."""
        flat: dict[str, Any] = {}
        for part, optimizer in self.pairs:
            flat |= states.get_optimizer_state_dict(part, optimizer, options=FLAT)
        return flat

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load them."""
        for part, optimizer in self.pairs:
            states.set_optimizer_state_dict(part, optimizer, state_dict, options=FLAT)


def loss_of(scores: Tensor, words: Tensor) -> Tensor:
    """The mean loss of the next words."""
    return F.cross_entropy(scores.flatten(0, 1), words.flatten())


def state_of(model: Llama, optimizers: Optimizers) -> dict[str, Any]:
    """What a checkpoint holds; the experts are in the optimizer's part."""
    return {"model": states.get_model_state_dict(model), "optimizer": optimizers.state_dict()}


def schedule_of(model: Llama, mesh: DeviceMesh, batch_size: int, dim: int) -> Any:
    """A pipeline that runs this rank's stage on two micro-batches.

    With its shapes: torch would find them by a forward on memory that nothing has filled, which
    a router would see.
    """
    stage, stages = mesh["pp"].get_local_rank(), mesh["pp"].size()
    device = next(model.parameters()).device
    rows = batch_size // mesh["dp"].size() // 2
    words = torch.empty(rows, TOKENS, dtype=torch.long, device=device)
    features = torch.empty(rows, TOKENS // mesh["tp"].size(), dim, device=device)
    scores = torch.empty(rows, TOKENS, WORDS, device=device)
    features.requires_grad_()
    part = PipelineStage(
        model,
        stage,
        stages,
        device,
        input_args=features if stage else words,
        output_args=features if stage < stages - 1 else scores,
        group=mesh["pp"].get_group(),
    )
    return Schedule1F1B(part, n_microbatches=2, loss_fn=loss_of)
