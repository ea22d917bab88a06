"""An optimizer's step on the expert stacks of a model, without its forward and backward."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import exfusion_param as exf
from exfusion_param.fusion.lookup import groups_of
from experts import expert_stacks


class Materialised:
    """Stacks as plain parameters, whose N-fold gradients are written for torch's fused AdamW."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = [w.current_weights() for w in groups_of(model) for _ in w.fused]
        self.stacks = [nn.Parameter(stack.clone()) for stack in expert_stacks(model)]
        self.fused = [torch.randn_like(stack[0]) for stack in self.stacks]
        self.gradients = [1e-3 * torch.randn_like(stack[0]) for stack in self.stacks]
        self.optimizer = torch.optim.AdamW(self.stacks, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        """Products, gradients, update, fusion."""
        for stack, w, gradient in zip(self.stacks, self.weights, self.gradients, strict=True):
            _ = stack.flatten(1) @ gradient.flatten()
            stack.grad = w.view(-1, *[1] * gradient.ndim) * gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        for stack, w, fused in zip(self.stacks, self.weights, self.fused, strict=True):
            fused.copy_(torch.tensordot(w, stack, dims=1))


class Wrapped:
    """A wrapped model with one of the optimizers that train it."""

    def __init__(self, model: nn.Module, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        self.model = model  # whose step the hooks look after for as long as it lives
        self.fused = [f.parameter for weights in groups_of(model) for f in weights.fused]
        self.gradients = [1e-3 * torch.randn_like(parameter) for parameter in self.fused]
        own = [p for weights in groups_of(model) for p in weights.parameters()]
        self.optimizer = make([*own, *self.fused])

    def step(self) -> None:
        """What the model's optimizer does, between backward and forward."""
        for parameter, gradient in zip(self.fused, self.gradients, strict=True):
            parameter.grad = gradient.detach()  # another object, the same numbers
        self.optimizer.step()
        self.optimizer.zero_grad()


Make = Callable[[Any], torch.optim.Optimizer]
KINDS: dict[str, tuple[int, Make]] = {
    "AdamW": (44, functools.partial(torch.optim.AdamW, fused=True)),
    "ExpertAdamW": (28, exf.ExpertAdamW),
    "bfloat16 states": (20, functools.partial(exf.ExpertAdamW, state_dtype=torch.bfloat16)),
}
