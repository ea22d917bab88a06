"""`fuse_on="step"`: the fused tensor is a leaf beside its stack, fused once for each step.

Note [The optimizer-side way]
All expert gradients are multiples of one dense gradient: with `G = dL/dW`, `dL/dE_i = w_i G` and
`dL/dw_i = <E_i, G>`. So a step's forward and backward can be those of the dense model on a leaf
`W`, which gets `G`. Around the optimizer's step (step_hooks.py):
- before it, `pull_back` turns `G` into the gradients of the stack and of the fusion weights, and
  takes it off the leaf, which no optimizer is to move;
- after it, the leaf gets `G` back, the stack's gradient is freed, and the leaf is fused anew.
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

from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .expert_fusion import ExpertFusion
from .fusion_weights import FusionWeights
from .shards import is_sharded, like, local, version


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
        self.__dict__["_sharded"] = None  # the leaf as FSDP2 made it, while a gathered one is there
        self.used: Tensor | None = None  # the fusion weights that the leaf is fused with, (N,)
        self._used_in_forward: Tensor | None = None  # those of the present gradient
        self._fused_from: object = None
        self._was_checked = False  # by an eager forward, since the leaf was fused
        self._gradient: Tensor | None = None  # the leaf's, during an optimizer's step

    def __getstate__(self) -> dict[str, Any]:
        """What a deepcopy takes along: leaf and stack are copied, and have new versions."""
        return self.__dict__ | {"_fused_from": None, "_gradient": None}

    @property
    def leaf(self) -> nn.Parameter:
        """The leaf that optimizers hold and that has the gradient, shape (*S)."""
        if is_sharded(self.fused):
            self.__dict__["_sharded"] = self.fused
        sharded: nn.Parameter | None = self.__dict__["_sharded"]
        return self.fused if sharded is None else sharded

    def forward(self, experts: Tensor) -> Tensor:
        """The leaf, shape (*S), of the stack `experts`, shape (N, *S)."""
        if not torch.compiler.is_compiling():
            self.refresh(experts)
            self._was_checked = True
        return self.fused

    def refresh(self, experts: Tensor) -> None:
        """Fuse anew if the stack, the fusion weights or the leaf are not those from then."""
        if self._fused_from == self._state(experts):
            return
        if not self.fused.is_leaf:
            raise RuntimeError(self._sharded_by_others())
        if self.leaf is not self.fused:
            raise RuntimeError(self._changed("their weight was gathered before", "reshard()"))
        self.fuse_anew(experts)

    @torch.no_grad()
    def fuse_anew(self, experts: Tensor) -> None:
        """Fuse the stack `experts`, shape (N, *S), into the leaf."""
        self.used = local(self.fusion_weights()).clone()
        local(self.leaf).copy_(functional.fuse(local(experts), self.used))
        needs = [experts, *self.fusion_weights.parameters()]
        self.leaf.requires_grad_(any(tensor.requires_grad for tensor in needs))
        self._fused_from = self._state(experts)
        self._was_checked = False

    @torch.no_grad()
    def pull_back(self, experts: nn.Parameter, takes_gradient: bool) -> None:
        """Give the stack the gradient `w_i G` if it is to take one, and hide the leaf's `G`."""
        self._restore_after_failure(experts)
        gradient = self.leaf.grad
        if gradient is None:
            return
        if takes_gradient and experts.requires_grad:
            assert self._used_in_forward is not None
            part = local(gradient)
            weights = self._used_in_forward.to(part).view(-1, *[1] * part.ndim)
            experts.grad = like(experts, weights * part)
        self.leaf.grad, self._gradient = None, gradient

    def give_back(self, experts: nn.Parameter) -> None:
        """Undo `pull_back`."""
        if self._gradient is not None:
            self.leaf.grad, self._gradient = self._gradient, None
            experts.grad = None

    @torch.no_grad()
    def inner_products(self, experts: Tensor) -> Tensor:
        """`<E_i, G>` of this rank's part of stack and gradient, shape (N,)."""
        gradient = self.leaf.grad
        assert gradient is not None
        dtype = functional.accumulation_dtype(experts.dtype)
        return local(experts).to(dtype).flatten(1) @ local(gradient).to(dtype).flatten()

    def check_before_step(self, experts: Tensor) -> None:
        """Raise if the gradient is not that of the experts as they are."""
        if is_sharded(self.leaf) and self.fusion_weights.sharing is None:
            raise RuntimeError(self._sharded_by_others())
        if self._was_checked or self._fused_from == self._state(experts):
            return
        # Torch's distributed checkpoints step on zeros, perhaps before any forward.
        if self._fused_from is not None and self._has_gradient():
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
        self._used_in_forward = self.used  # before an optimizer of the fusion weights moves them

    def train(self, mode: bool = True) -> FusedLeaf:
        """Switch, and fuse anew: a write to `.data` of a stack leaves no other trace."""
        super().train(mode)
        for stack, leaf in leaves_of(self.fusion_weights):
            if leaf is self and self.leaf is self.fused:
                self.fuse_anew(stack)
        return self

    def _restore_after_failure(self, experts: nn.Parameter) -> None:
        """An optimizer's step has failed if the leaf's gradient is still hidden."""
        if self._gradient is not None and self.leaf.grad is None and experts.grad is not None:
            self.leaf.grad = self._gradient
        self._gradient = None

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
        tensors = [experts, self.leaf, *self.fusion_weights.parameters()]
        tensors += self.fusion_weights.buffers()
        return [(id(tensor), version(tensor), tensor.dtype, tensor.device) for tensor in tensors]

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
    fusions = (
        (fusions.original, fusions[0])
        for linear in weights.linears
        for fusions in getattr(linear, "parametrizations", {}).values()
    )
    return [(stack, leaf) for stack, leaf in fusions if isinstance(leaf, FusedLeaf)]
