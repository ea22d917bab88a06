"""`fuse_on="step"`: the fused tensor is a leaf beside its stack, fused once for each step.

Note [The optimizer-side way]
All expert gradients are multiples of one dense gradient: with `G = dL/dW`, `dL/dE_i = w_i G` and
`dL/dw_i = <E_i, G>`. So a step's forward and backward can be those of the dense model on a leaf
`W`, which gets `G`. Around the optimizer's step (step_hooks.py):
- before it, `pull_back` turns `G` into the gradient of the fusion weights, and takes it off the
  leaf, which no optimizer is to move;
- after it, when all else has moved, the stacks are updated, one at a time (one_by_one.py) or by an
  optimizer made for them (expert_optimizers.py); then the leaf gets `G` back, and is fused anew.
Optimizers that are not known to allow this take gradients of all their stacks into their step.
Between two steps nothing knows of experts: no graph, no traffic and no memory beyond the stacks.

Static and learned fusion weights train as under "forward". A memory bank fuses with the bank of the
step before, its router sends no gradient into the FFN's input, and the router's own gradient comes
from means over the step's tokens (`functional.router_gradient`).

Note [Leaf and stack agree]
The leaf is no part of the state dict, and is fused anew wherever stack or fusion weights may have
changed: after an optimizer's step, `load_state_dict`, a switch between training and eval, and, in
eager mode, before a forward that finds other versions of the tensors than it was fused from. Under
FSDP2 that is before the whole model's forward, as long as the leaf has not been gathered.

Note [Sharded leaves]
Under FSDP2 (distributed.py) leaf and stack are DTensors, with the same rows on each rank. All that
this module does is done to those rows. FSDP2 takes the leaf for a weight of the model: during
forward and backward it puts the gathered one in its place, and the gradient, reduced and scattered,
ends at the parameter that the optimizer holds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from .expert_fusion import ExpertFusion
from .expert_sums import RunningFusion, fuse_into, products_with
from .fusion_weights import FusionWeights
from .shards import is_sharded, like, local, version, with_memory_of


@dataclasses.dataclass(slots=True)
class _Now:
    """What holds for a leaf from one step to the next.

    Args:
        used: the fusion weights that the leaf is fused with, shape (N,).
        used_in_forward: those of the present gradient.
        fused_from: the state of all that it is fused from.
        was_checked: by an eager forward, since the leaf was fused.
        gradient: the leaf's, during an optimizer's step.
        is_running: an optimizer fuses, see `running_fusion`.
        sharded: the leaf as FSDP2 made it, while a gathered one is in its place.
    """

    used: Tensor | None = None
    used_in_forward: Tensor | None = None
    fused_from: object = None
    was_checked: bool = False
    gradient: Tensor | None = None
    is_running: bool = False
    sharded: nn.Parameter | None = None


class FusedLeaf(ExpertFusion):
    """The parametrization of one stack under `fuse_on="step"`.

    Args:
        fusion_weights: the group's fusion weights.
        experts: the stack to start with, shape (N, *S).
        owns_weights: whether the fusion weights are this module's child.
    """

    def __init__(self, fusion_weights: FusionWeights, experts: Tensor, owns_weights: bool) -> None:
        super().__init__(fusion_weights, experts, owns_weights)
        self.fused = nn.Parameter(experts.new_empty(experts.shape[1:]))  # (*S)
        self._now = _Now()

    def __getstate__(self) -> dict[str, Any]:
        """What a deepcopy takes along: leaf and stack are copied, and have new versions."""
        now = dataclasses.replace(self._now, fused_from=None, gradient=None, is_running=False)
        return self.__dict__ | {"_now": now}

    def right_inverse(self, tensor: Tensor) -> Tensor:
        """The stack for a dense tensor, as `ExpertFusion` makes it, in the dtype of the stack."""
        is_first = self._first_experts is not None  # and torch wants them in the tensor's dtype
        experts = super().right_inverse(tensor)
        return experts if is_first else self._as_stored(experts)

    def stored(self, stack: nn.Parameter) -> nn.Parameter:
        """The stack that this module was registered with, shape (N, *S), as it is stored."""
        if self.fusion_weights.config.expert_dtype == "model":
            return stack
        return nn.Parameter(stack.detach().to(torch.bfloat16), stack.requires_grad)

    def fused_parameter(self, stack: nn.Parameter) -> nn.Parameter:
        """What torch can put the fused tensor into, as it wants the same dtype."""
        self.refresh(stack)
        if self.moved(stack) is stack and stack.dtype == self.fused.dtype:
            return stack
        fused = nn.Parameter(self.leaf.detach().clone(), self.moved(stack).requires_grad)
        self._is_fused(fused)
        return fused

    def _as_stored(self, experts: Tensor) -> Tensor:
        stack = next(holder.original for holder, own in self.fusion_weights.fusions if own is self)
        return experts.to(stack.dtype)

    @property
    def leaf(self) -> nn.Parameter:
        """The leaf that optimizers hold and that has the gradient, shape (*S)."""
        fused = self.fused
        if is_sharded(fused):
            self._now.sharded = fused
        return fused if self._now.sharded is None else self._now.sharded

    def forward(self, experts: Tensor) -> Tensor:
        """The leaf, shape (*S), of the stack `experts`, shape (N, *S)."""
        if not torch.compiler.is_compiling():
            self.refresh(experts)
            self._now.was_checked = True
        return self.fused

    def refresh(self, experts: Tensor) -> None:
        """Fuse anew if the stack, the fusion weights or the leaf are not those from then."""
        if self._now.fused_from == self._state(experts):
            return
        if not self.fused.is_leaf:
            raise RuntimeError(self._sharded_by_others())
        if self.leaf is not self.fused:
            raise RuntimeError(self._changed("their weight was gathered before", "reshard()"))
        self.fuse_anew(experts)

    @torch.no_grad()
    def fuse_anew(self, experts: Tensor) -> None:
        """Fuse the stack `experts`, shape (N, *S), into the leaf."""
        self._now.used = local(self.fusion_weights()).clone()
        self._fuse(local(experts), self._now.used, local(self.leaf))
        self._is_fused(experts)

    def dense(self, stack: Tensor) -> Tensor:
        """The fused tensor as the stack has it now, shape (*S); a DTensor if the leaf is one."""
        fused = torch.empty_like(local(self.leaf))
        self._fuse(local(stack), local(self.fusion_weights()), fused)
        return with_memory_of(fused, self.leaf)

    def running_fusion(self) -> RunningFusion:
        """The leaf as it comes together, for an optimizer that updates the experts meanwhile."""
        self._now.used, self._now.is_running = local(self.fusion_weights()).clone(), True
        return RunningFusion(local(self.leaf), self._now.used)

    def _is_fused(self, experts: Any) -> None:
        needs = [self.moved(experts), *self.fusion_weights.own_tensors()]
        self.leaf.requires_grad_(any(tensor.requires_grad for tensor in needs))
        self._now.fused_from = self._state(experts)
        self._now.was_checked = self._now.is_running = False

    def settle(self, experts: nn.Parameter) -> None:
        """An optimizer's step is over: give `G` back, and fuse unless the optimizer has."""
        if self._now.gradient is not None:
            self.leaf.grad, self._now.gradient = self._now.gradient, None
            experts.grad = None
        if self._now.is_running:
            self._is_fused(experts)
        else:
            self.fuse_anew(experts)

    @property
    def hidden_gradient(self) -> Tensor | None:
        """During an optimizer's step the leaf's gradient `G`, shape (*S)."""
        return self._now.gradient

    @property
    def weights_of_gradient(self) -> Tensor:
        """The fusion weights that the present gradient was taken under, shape (N,)."""
        assert self._now.used_in_forward is not None
        return self._now.used_in_forward

    def hide_gradient(self, experts: nn.Parameter, is_retry: bool) -> None:
        """Take the leaf's gradient `G` off it, which no optimizer is to move.

        Args:
            experts: the stack.
            is_retry: whether an optimizer tries again after a step that failed.
        """
        experts.grad = None
        if self._now.gradient is not None and self.leaf.grad is None and is_retry:
            return
        self.leaf.grad, self._now.gradient = None, self.leaf.grad

    @torch.no_grad()
    def give_gradient(self, experts: nn.Parameter) -> bool:
        """Give the stack the gradient `w_i G`; false if there is none."""
        if self._now.gradient is None or not experts.requires_grad:
            return False
        part = local(self._now.gradient)
        weights = self.weights_of_gradient.to(part).view(-1, *[1] * part.ndim)
        experts.grad = like(experts, weights * part)
        return True

    @torch.no_grad()
    def inner_products(self, experts: Tensor) -> Tensor:
        """`<E_i, G>` of this rank's part of stack and gradient, shape (N,)."""
        assert self.leaf.grad is not None
        return products_with(local(experts), local(self.leaf.grad))

    def check_before_step(self, experts: Tensor) -> None:
        """Raise if the gradient is not that of the experts as they are."""
        if is_sharded(self.leaf) and self.fusion_weights.sharing is None:
            raise RuntimeError(self._sharded_by_others())
        if self._now.was_checked or self._now.fused_from == self._state(experts):
            return
        # Torch's distributed checkpoints step on zeros, perhaps before any forward.
        if self._now.fused_from is not None and self._has_gradient():
            raise RuntimeError(self._changed("the compiled forward did not see it", "train()"))
        self.fuse_anew(experts)

    def _has_gradient(self) -> bool:
        return self.leaf.grad is not None and bool(local(self.leaf.grad).any())

    def was_pulled_back(self) -> bool:
        """Whether the fusion weights have got their part of the present gradient."""
        gradient: Any = self.leaf.grad
        return getattr(gradient, "_pulled_back", None) == version(gradient)

    def note_pull_back(self) -> None:
        """The fusion weights have got their part of the present gradient."""
        gradient: Any = self.leaf.grad
        gradient._pulled_back = version(gradient)
        self._now.used_in_forward = (
            self._now.used
        )  # before an optimizer of the fusion weights moves them

    def train(self, mode: bool = True) -> FusedLeaf:
        """Switch, and fuse anew: a write to `.data` of a stack leaves no other trace."""
        super().train(mode)
        for stack, leaf in leaves_of(self.fusion_weights):
            if leaf is self and self.leaf is self.fused:
                self.fuse_anew(stack)
        return self

    def _sharded_by_others(self) -> str:
        return (
            f"{self.fusion_weights.group!r} was sharded as if its experts were weights of the "
            "model. Call exfusion_param.fully_shard(model, mesh=...) instead, or wrap with "
            'fuse_on="forward".'
        )

    def _changed(self, reason: str, way_out: str) -> str:
        return (
            f"Experts of {self.fusion_weights.group!r} were changed in place, and {reason}. "
            f"Call model.{way_out} after such a change."
        )

    def _state(self, experts: Tensor) -> object:
        tensors = [*self.sources(experts), self.leaf, *self.fusion_weights.own_tensors()]
        return [(id(tensor), version(tensor), tensor.dtype, tensor.device) for tensor in tensors]

    def _fuse(self, experts: Tensor, weights: Tensor, out: Tensor) -> None:
        """Fuse this rank's part of the experts, shape (N, *S), into `out`, shape (*S)."""
        fuse_into(out, experts, weights)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}fused"]

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *rest
        )
        if f"{prefix}fused" in missing_keys:
            missing_keys.remove(f"{prefix}fused")


def leaves_of(weights: FusionWeights) -> list[tuple[nn.Parameter, FusedLeaf]]:
    """The stacks of a group that have leaves, each with its leaf."""
    return [
        (holder.original, fusion)
        for holder, fusion in weights.fusions
        if isinstance(fusion, FusedLeaf)
    ]
