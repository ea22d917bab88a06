"""The fusion weights `w` of one FFN group, shape (N,): static and learned.

One module serves all linears of the group. It belongs to the weight parametrization of the first,
so that it appears once in `state_dict()` and goes with `remove_parametrizations`. Its tensors stay
in float32 at least, also in a bfloat16 model: they move by less than bfloat16 resolves. The third
variant, the memory bank, is in memory_bank.py.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import functional, step_hooks
from .dtypes import accumulation_dtype
from .expert_config import ExpertConfig
from .linear_class import MakeForward, PlaceInGroup
from .ranks import Ranks, all_ranks
from .shards import like, local, whole

Linears = tuple[nn.Module, ...]


class FusionWeights(nn.Module):
    """What all variants share. Calling the module gives the `w` to fuse with now.

    Args:
        group: name of the FFN group, its FFN's name in the model that was wrapped.
        first_linear: name of the first linear within the FFN.
        config: the settings of the parametrization.
        linears: the linears that fuse with these weights.
    """

    linears: Linears
    fusions: list[tuple[Any, Any]]
    """For each stack the `ParametrizationList` that holds it, and the parametrization."""

    def __init__(
        self, group: str, first_linear: str, config: ExpertConfig, linears: Linears
    ) -> None:
        super().__init__()
        self.group = group
        self.first_linear = first_linear
        self.config = config
        self.handles: list[RemovableHandle] = []  # of hooks that serve this group
        self.sharing: Ranks | None = None  # set by fully_shard
        # Kept out of the submodules: the linears own this module, not the reverse.
        self.__dict__["linears"] = linears
        self.__dict__["fusions"] = []
        step_hooks.watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:  # deepcopy ends here
        super().__setstate__(state)
        step_hooks.watch(self)

    def forward(self) -> Tensor:
        """The fusion weights to fuse with now, shape (N,)."""
        raise NotImplementedError

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start anew, as `wrap` does.

        Args:
            generator: draws a router; None takes torch's global one.
        """

    def fuse(self, experts: Tensor) -> Tensor:
        """The fused tensor, shape (*S), of the stack `experts`, shape (N, *S)."""
        return functional.fuse(experts, self())

    def require_fusable(self) -> None:
        """Raise a ValueError unless there is one dense model to fuse to."""

    def reported(self) -> Tensor:
        """What `metrics` says of the fusion weights, shape (N,)."""
        return whole(self())

    def forward_of(self, place: PlaceInGroup) -> MakeForward | None:
        """What makes the `forward` of a linear of the group; None leaves it as it is."""
        return None

    def start(self) -> Tensor:
        """The weights that upcycled experts are to fuse under, shape (N,), of non-zero sum."""
        return whole(self())

    def own_tensors(self) -> list[Tensor]:
        """Parameters and buffers; quicker than by nn.Module's generators."""
        tensors = [*self._parameters.values(), *self._buffers.values()]
        return [tensor for tensor in tensors if tensor is not None]

    @property
    def ranks(self) -> Ranks:
        """The ranks that train the model together: those of its mesh, or else all of the job."""
        return self.sharing or all_ranks()

    def statistics(self, products: Tensor) -> Tensor:
        """Under `fuse_on="step"`: what this rank says of the step's gradient, to be summed.

        Args:
            products: `<E_i, G>` of this rank's part of the stacks, shape (N,).

        Returns:
            One dimension; the same shape on all ranks.
        """
        return products.new_empty(0)

    def take_gradient(self, sums: Tensor) -> None:
        """Under `fuse_on="step"`: take what the step's gradient says of the fusion weights.

        Args:
            sums: of all ranks' statistics.
        """

    def optimizer_stepped(self, skipped: Tensor | None) -> None:
        """An optimizer of the group's parameters has stepped.

        Args:
            skipped: a boolean, shape (), on the device, if the optimizer's own kernel may have
                skipped the step because a GradScaler found an overflow.
        """

    def health(self) -> Tensor | None:
        """Numbers of one dimension that have to be finite after the step; None if none changed."""
        return None

    def warn_of(self, health: Tensor) -> None:
        """Warn of what `health` said, on the CPU."""

    def release(self) -> None:
        """The group's forward is over."""

    def retire(self) -> None:
        """Leave no hook behind; the group is about to be fused."""
        self.release()
        for handle in self.handles:
            handle.remove()

    def is_empty(self) -> bool:
        """Whether all fusion weights are zero, as in a bank before its first move."""
        return False

    def settle(self) -> None:
        """Under `fuse_on="step"`: the step is over, so fuse the leaves anew."""
        from .fused_leaf import leaves_of

        for stack, leaf in leaves_of(self):
            leaf.settle(stack)

    def leaves(self) -> list[nn.Parameter]:
        """What stands for the stacks in forward and backward, as optimizers hold it."""
        from .fused_leaf import leaves_of

        return [leaf.leaf for _, leaf in leaves_of(self)]

    def hidden_gradients(self) -> list[Tensor]:
        """During an optimizer's step the gradients of the leaves."""
        from .fused_leaf import leaves_of

        hidden = (leaf.hidden_gradient for _, leaf in leaves_of(self))
        return [gradient for gradient in hidden if gradient is not None]

    def moved_parameters(self) -> Iterator[nn.Parameter]:
        """What optimizers move for the experts: the stacks, or what all experts of each share."""
        for holder, fusion in self.fusions:
            yield fusion.moved(holder.original)

    def moved_at_step(self) -> Iterator[nn.Parameter]:
        """Under `fuse_on="step"`: what autograd does not reach, stacks as well that never move."""
        leaves = set(map(id, self.leaves()))
        for parameter in itertools.chain(self.parameters(), self.expert_parameters()):
            if id(parameter) not in leaves:
                yield parameter

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the group's linears: stacks, and leaves under `fuse_on="step"`."""
        for holder, _ in self.fusions:
            yield from holder.parameters()

    def expert_stacks(self) -> Iterator[nn.Parameter]:
        """The expert stacks that fuse with these weights."""
        for holder, _ in self.fusions:
            yield holder.original

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusionWeights:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_low = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if is_low else moved

        super()._apply(keep_precision, recurse)
        return self


class StaticWeights(FusionWeights):
    """`sw`: `w_i = 1/N`, fixed (Eq. 8)."""

    def forward(self) -> Tensor:
        """1/N, shape (N,)."""
        moved = local(next(self.moved_parameters()))
        # Made anew each time: a constant buffer would come back from the meta device unset.
        dtype = accumulation_dtype(moved.dtype)
        return uniform_weights(self.config.num_experts, moved.device, dtype)


class LearnedWeights(FusionWeights):
    """`dw`: one learned vector for the whole group, from 1/N on, without softmax (Eq. 9)."""

    def __init__(
        self,
        group: str,
        first_linear: str,
        config: ExpertConfig,
        linears: Linears,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(group, first_linear, config, linears)
        self.weights = nn.Parameter(uniform_weights(config.num_experts, device, dtype))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the weights to 1/N."""
        nn.init.constant_(local(self.weights), 1 / self.config.num_experts)

    def forward(self) -> Tensor:
        """The learned vector, shape (N,)."""
        return self.weights

    def health(self) -> Tensor | None:
        """The vector, or this rank's part of it."""
        return local(self.weights)

    def statistics(self, products: Tensor) -> Tensor:
        """`dL/dw`, shape (N,), of which each of several replicas says a part."""
        return products / self.ranks.replicas

    def take_gradient(self, sums: Tensor) -> None:
        """It is the vector's own."""
        if self.weights.requires_grad:
            self.weights.grad = like(self.weights, sums)


def uniform_weights(num_experts: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """1/N for each of N experts, shape (N,)."""
    return torch.full((num_experts,), 1 / num_experts, device=device, dtype=dtype)


def warn_of_empty_banks(groups: Iterable[FusionWeights]) -> None:
    """Warn if what is about to be shipped or loaded is multiplied by zero."""
    if empty := sorted(weights.group for weights in groups if weights.is_empty()):
        warnings.warn(
            f"The memory bank of {len(empty)} FFN groups ({empty[0]!r} first) is still zero, and "
            'so are their fused weights. Train first, or wrap with bank_init="uniform".',
            stacklevel=3,
        )
