"""AdamW and SGD that update expert stacks from the one dense gradient of their fused weight.

Under `fuse_on="step"` they hold no N-fold gradient, and pass over each stack once to update and to
fuse it (stack_step.py). Everything else, and everything under `fuse_on="forward"`, is left to the
torch optimizer that each of them is. Experts have that optimizer's states, so that each loads the
other's state dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from .one_pass import OnePassOptimizer
from .slots import Slot
from .stack_step import Batch
from .state_storage import StateDtype


class ExpertAdamW(OnePassOptimizer, torch.optim.AdamW):
    """AdamW in one pass over the experts; computes the same as `torch.optim.AdamW`.

    Under `fuse_on="step"` no N-fold gradient is stored. The two optimizers can load each other's
    state dicts. AdamW is described in arXiv 1711.05101.

    Args:
        params: as for torch's AdamW; `exf.param_groups(model, weight_decay)` makes groups.
        lr: learning rate.
        betas: decay rates of the two running means.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        maximize: maximize the objective instead of minimizing it.
        fused: use torch's fused kernel; set to False for devices without one.
        state_dtype: dtype of the experts' running means under `fuse_on="step"`: None for that of
            the weight, `torch.float32`, `torch.bfloat16`, or torchao's `"8bit"`, which loads only
            on the number of ranks that saved it.
        expert_dtype: dtype of the experts under `fuse_on="step"`: None for that of the weight,
            `torch.float32` or `torch.bfloat16`. Unless both dtypes are None, the update is computed
            in float32, and values stored in bfloat16 are rounded stochastically.

    Raises:
        ValueError: an argument is out of range.
        ImportError: `"8bit"` without torchao.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        >>> model = exf.wrap(model, fuse_on="step")
        >>> optimizer = exf.ExpertAdamW(exf.param_groups(model, weight_decay=0.05), lr=1e-3)
        >>> model(torch.randn(4, 8)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model[0].weight]["experts"].shape
        torch.Size([4, 16, 8])
    """

    required: ClassVar[Mapping[str, Any]] = {"amsgrad": False, "decoupled_weight_decay": True}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        fused: bool = True,
        state_dtype: StateDtype | None = None,
        expert_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize, fused=fused)
        self._set_up(state_dtype, expert_dtype)

    def _kinds_of_state(self, group: dict[str, Any]) -> dict[str, bool]:
        return {"exp_avg": True, "exp_avg_sq": False}

    def _count_of(self, slot: Slot) -> Tensor:
        is_fused = any(group["fused"] for group in self.param_groups)
        count: Tensor = slot.state.get("step", torch.zeros(()))
        count = slot.state["step"] = count.to(slot.experts.device) if is_fused else count
        return count

    def _update(self, group: dict[str, Any], batch: Batch) -> None:
        adamw(
            batch.experts,
            batch.gradients,
            batch.states[0],
            batch.states[1],
            [],
            batch.counts,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            fused=group["fused"],
            **self._of_grad_scaler(),
        )


class ExpertSGD(OnePassOptimizer, torch.optim.SGD):
    """SGD in one pass over the experts; computes the same as `torch.optim.SGD`.

    Under `fuse_on="step"` no N-fold gradient is stored. The two optimizers can load each other's
    state dicts.

    Args:
        params: as for torch's SGD; `exf.param_groups(model, weight_decay)` makes groups.
        lr: learning rate.
        momentum: decay of the running sum of gradients.
        weight_decay: factor of the weight that is added to the gradient.
        nesterov: use Nesterov momentum.
        maximize: maximize the objective instead of minimizing it.
        fused: use torch's fused kernel; set to False for devices without one.
        state_dtype: dtype of the experts' running sums, as for `ExpertAdamW`.
        expert_dtype: as for `ExpertAdamW`.

    Raises:
        ValueError: an argument is out of range.
        ImportError: `"8bit"` without torchao.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        >>> model = exf.wrap(model, fuse_on="step")
        >>> optimizer = exf.ExpertSGD(exf.param_groups(model, 1e-4), lr=0.1, momentum=0.9)
        >>> model(torch.randn(4, 8)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model[0].weight])
        ['experts', 'experts.momentum_buffer']
    """

    required: ClassVar[Mapping[str, Any]] = {"dampening": 0.0}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        maximize: bool = False,
        fused: bool = True,
        state_dtype: StateDtype | None = None,
        expert_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            fused=fused,
        )
        self._set_up(state_dtype, expert_dtype)

    def make_ready(self) -> None:
        """Start running sums of zero where torch's kernel would take uninitialised memory.

        It makes them at its first step, and fills none if a GradScaler skips that one.
        """
        for group in self.param_groups:
            if group["fused"] and group["momentum"]:
                for parameter in group["params"]:
                    if parameter.grad is not None and not self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def _kinds_of_state(self, group: dict[str, Any]) -> dict[str, bool]:
        return {"momentum_buffer": True} if group["momentum"] else {}

    def _update(self, group: dict[str, Any], batch: Batch) -> None:
        buffers: list[Any] = batch.states[0] if batch.states else [None] * len(batch.experts)
        sgd(
            batch.experts,
            batch.gradients,
            buffers,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            fused=group["fused"],
            **self._of_grad_scaler(),
        )
