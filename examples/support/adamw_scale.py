"""AdamW whose steps are as large as the parameters, nanoT5's optimizer.

nanoT5 found that plain AdamW diverges at T5's learning rates, and that what keeps Adafactor from it
is this scale (https://github.com/PiotrNawrot/nanoT5, section "AdamW with RMS scaling").
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class AdamWScale(torch.optim.Optimizer):
    """Adam with decoupled weight decay; steps are multiplied by the parameter's root mean square.

    Experts that lie in one parameter, as under `fuse_on="forward"`, share one scale.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, relative to the size of a parameter.
        betas: of the two averages.
        eps: added to the root of the second average.
        weight_decay: the share of a parameter that a step at lr 1 takes away.
        smallest: scale of a parameter that is smaller, as one of zeros.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        smallest: float = 1e-3,
    ) -> None:
        fields = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, fields | {"smallest": smallest})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters that have gradients; the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        first, second = group["betas"]
        mean = state["exp_avg"].lerp_(gradient, 1 - first)
        square = state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        corrected = (1 - second ** state["step"]) ** 0.5 / (1 - first ** state["step"])
        scale = parameter.square().mean().sqrt().clamp(min=group["smallest"])
        direction = corrected * scale * mean / (square.sqrt() + group["eps"])
        parameter.sub_(direction, alpha=group["lr"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
