"""AdamW and SGD that update expert stacks from the one dense gradient of their fused weight.

Under `fuse_on="step"` they hold no N-fold gradient, and pass over each stack once to update and to
fuse it (stack_step.py). The inner products `<E_i, G>` that learned fusion weights and routers need
take a pass before it, as the fusion weights that the new experts are fused under depend on them.
Everything else, and everything under `fuse_on="forward"`, is left to the torch optimizer that each
of them is. Stacks have that optimizer's states too, so that either loads the other's.

Note [When stacks are updated]
The step hooks (step_hooks.py) hide the gradients of the fused weights before the optimizer's step,
which then updates everything but the stacks. After it, when the fusion weights are those of the
next step, they call `update_stacks`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer, ParamsT
from torch.optim.sgd import sgd

from .dtypes import accumulation_dtype
from .shards import local
from .stack_step import Part, StackStep, update_stacks
from .state_storage import StateDtype, check_state_dtype, stored
from .step_hooks import watched

if TYPE_CHECKING:
    from .fused_leaf import FusedLeaf


OWN_SETTINGS = ("state_dtype", "fused", "foreach")
"""Of a group, which a loaded state dict does not change."""


class ExpertOptimizer(Optimizer):
    """What optimizers of stacks have in common."""

    unsupported: str
    """A setting of torch's optimizer that stacks cannot have."""

    def _set_up(self, state_dtype: StateDtype | None) -> None:
        """Add what torch's optimizer does not know, at the end of `__init__`."""
        self.defaults["state_dtype"] = state_dtype
        for group in self.param_groups:
            group.setdefault("state_dtype", state_dtype)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this optimizer, or of torch's that it is.

        States of stacks keep the dtypes that they were saved in until the next step, which stores
        them as this optimizer does.

        Raises:
            ValueError: the groups differ, or ask for what stacks cannot have.
        """
        if any(group.get(self.unsupported) for group in state_dict["param_groups"]):
            raise ValueError(f"{type(self).__name__} has no {self.unsupported} for expert stacks.")
        own = [{name: group.get(name) for name in OWN_SETTINGS} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, settings in zip(self.param_groups, own, strict=True):
            group.update(settings)
        self._take_uncast(state_dict)

    def _take_uncast(self, state_dict: dict[str, Any]) -> None:
        """Take the states of stacks in the dtypes that they were saved in; torch casts them all."""
        stacks = {id(stack) for weights in watched() for stack in weights.expert_stacks()}
        saved = itertools.chain(*(group["params"] for group in state_dict["param_groups"]))
        held = itertools.chain(*(group["params"] for group in self.param_groups))
        for key, parameter in zip(saved, held, strict=True):
            states = state_dict["state"].get(key, {}) if id(parameter) in stacks else {}
            for name, value in states.items():
                if name != "step" and isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)

    @torch.no_grad()
    def update_stacks(self, leaves: Iterable[tuple[nn.Parameter, FusedLeaf]]) -> None:
        """Update the stacks whose leaves have a gradient, and fuse them into the leaves.

        Args:
            leaves: stacks that this optimizer holds, each with its leaf.
        """
        leaf_of = {id(stack): leaf for stack, leaf in leaves if leaf.moved(stack) is stack}
        for group in self.param_groups:
            due = [(p, leaf_of[id(p)]) for p in group["params"] if id(p) in leaf_of]
            steps = self._steps(group, due, self._generators(group))
            update_stacks(steps, functools.partial(self._update, group))

    def _steps(
        self,
        group: dict[str, Any],
        due: Iterable[tuple[nn.Parameter, FusedLeaf]],
        generators: Callable[[torch.device], torch.Generator],
    ) -> Iterator[StackStep]:
        for stack, leaf in due:
            if (gradient := leaf.hidden_gradient) is None or not stack.requires_grad:
                continue
            yield StackStep(
                experts=local(stack),
                gradient=local(gradient),
                weights=leaf.weights_of_gradient,
                dtype=self._dtype_of(leaf, group),
                fusion=leaf.running_fusion(),
                states=[local(state) for state in self._states_of(stack, leaf, group)],
                count=self._count_of(stack),
                generator=generators(stack.device),
            )

    def _states_of(
        self, stack: nn.Parameter, leaf: FusedLeaf, group: dict[str, Any]
    ) -> list[Tensor]:
        """The states of a stack, made at its first step and stored as asked for after a load."""
        state, kinds = self.state[stack], self._kinds_of_state(group)
        dtype = leaf.leaf.dtype if group["state_dtype"] is None else group["state_dtype"]
        for name, signed in kinds.items():
            state[name] = stored(state.get(name), stack, dtype, signed)
        return [state[name] for name in kinds]

    def _dtype_of(self, leaf: FusedLeaf, group: dict[str, Any]) -> torch.dtype:
        """What a stack's update is computed in."""
        dtype = leaf.leaf.dtype
        return dtype if group["state_dtype"] is None else accumulation_dtype(dtype)

    def _generators(self, group: dict[str, Any]) -> Callable[[torch.device], torch.Generator]:
        """For each device what rounds this step's numbers: alike on all replicas, and resumed."""
        group["rounding_seed"] = seed = group.get("rounding_seed", 0) + 1
        return functools.cache(lambda device: torch.Generator(device).manual_seed(seed))

    def _kinds_of_state(self, group: dict[str, Any]) -> dict[str, bool]:
        """The names of a stack's states, and whether they may be negative."""
        raise NotImplementedError

    def _count_of(self, stack: nn.Parameter) -> Tensor:
        """How many steps the stack has made, shape (), as torch's optimizers hold it."""
        return torch.zeros(())

    def _update(self, group: dict[str, Any], parts: list[Part]) -> None:
        raise NotImplementedError

    def _of_grad_scaler(self) -> dict[str, Any]:
        """What a GradScaler has said of this step."""
        return {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}


class ExpertAdamW(ExpertOptimizer, torch.optim.AdamW):
    """AdamW that holds no N-fold gradient, see `torch.optim.AdamW` (arXiv 1711.05101).

    Args:
        params: as for torch's; `exf.param_groups(model, weight_decay)` makes groups.
        lr: learning rate.
        betas: decays of the two running means.
        eps: added to the denominator.
        weight_decay: decoupled.
        maximize: the objective instead of minimizing it.
        fused: use torch's fused kernel; False for devices that have none.
        state_dtype: under `fuse_on="step"` of the stacks' two running means: None takes that of the
            fused weights; or `torch.float32`, `torch.bfloat16`, or `"8bit"`, torchao's, which load
            on as many ranks as saved them. Unless it is None the update is computed in float32, and
            what is stored in bfloat16, stacks as well, is rounded stochastically. So are stacks
            under `expert_dtype="bfloat16"` in any case.

    Raises:
        ValueError: an argument is outside of its range.
        ImportError: `"8bit"` without torchao.
    """

    unsupported = "amsgrad"

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
    ) -> None:
        check_state_dtype(state_dtype)
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize, fused=fused)
        self._set_up(state_dtype)

    def _kinds_of_state(self, group: dict[str, Any]) -> dict[str, bool]:
        return {"exp_avg": True, "exp_avg_sq": False}

    def _count_of(self, stack: nn.Parameter) -> Tensor:
        state = self.state[stack]
        if "step" not in state:
            is_fused = any(group["fused"] for group in self.param_groups)
            state["step"] = torch.zeros((), device=stack.device if is_fused else "cpu")
        count: Tensor = state["step"]
        return count

    def _update(self, group: dict[str, Any], parts: list[Part]) -> None:
        adamw(
            [part.experts for part in parts],
            [part.gradient for part in parts],
            [part.states[0] for part in parts],
            [part.states[1] for part in parts],
            [],
            [part.count for part in parts],
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


class ExpertSGD(ExpertOptimizer, torch.optim.SGD):
    """SGD that holds no N-fold gradient, see `torch.optim.SGD`.

    Args:
        params: as for torch's; `exf.param_groups(model, weight_decay)` makes groups.
        lr: learning rate.
        momentum: decay of the running sum of gradients.
        weight_decay: added to the gradient, times the weight.
        nesterov: momentum.
        maximize: the objective instead of minimizing it.
        fused: use torch's fused kernel; False for devices that have none.
        state_dtype: of the stacks' running sums, as for `ExpertAdamW`.

    Raises:
        ValueError: an argument is outside of its range.
        ImportError: `"8bit"` without torchao.
    """

    unsupported = "dampening"

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
    ) -> None:
        check_state_dtype(state_dtype)
        super().__init__(
            params,
            lr,
            momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            fused=fused,
        )
        self._set_up(state_dtype)

    def _kinds_of_state(self, group: dict[str, Any]) -> dict[str, bool]:
        return {"momentum_buffer": True} if group["momentum"] else {}

    def _update(self, group: dict[str, Any], parts: list[Part]) -> None:
        buffers: list[Tensor | None] = [part.states[0] if part.states else None for part in parts]
        sgd(
            [part.experts for part in parts],
            [part.gradient for part in parts],
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
