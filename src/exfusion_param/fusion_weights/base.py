"""The fusion weights `w` of one FFN group, shape (N,): what the variants have in common.

One module serves all linears of the group. Under `fuse_on="forward"` it belongs to the weight
parametrization of the first, so that it appears once in `state_dict()` and goes with
`remove_parametrizations`; under "step" to the FFN (step/attach.py). Its tensors stay in float32 at
least, also in a bfloat16 model: they move by less than bfloat16 resolves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..expert_config import ExpertConfig
from ..finding.discovery import FFNGroup
from ..finding.place import PlaceInGroup
from ..tensors import functional
from ..tensors.expert_starts import named_generator
from ..tensors.precision import accumulation_dtype, leaves_memory_unset, raise_precision
from ..tensors.ranks import Ranks, all_ranks, ranks_of_ddp, require_known
from ..tensors.shards import full_tensor, ranks_of
from .fused import Fused
from .single_instance import SingleInstance

# In the order of wrapping, which is the same on all ranks.
_live_groups: weakref.WeakKeyDictionary[FusionWeights, None] = weakref.WeakKeyDictionary()
_on_creation: list[Callable[[], None]] = []


def live_groups() -> list[FusionWeights]:
    """The fusion weights of every FFN group in this process, in the order of wrapping."""
    return [group for ref in _live_groups.keyrefs() if (group := ref()) is not None]


def on_creation(prepare: Callable[[], None]) -> None:
    """Have `prepare` called whenever fusion weights are created: by `wrap`, a copy or a pickle."""
    _on_creation.append(prepare)


class FusionWeights(SingleInstance):
    """The base of all variants. Calling the module returns the `w` to fuse with now.

    Args:
        group: the linears that fuse with these weights, named as in the model that is wrapped.
        config: the settings of the parametrization.
        seed: of the draws.
    """

    drawn = "router"
    """What draws by `reset_parameters` are named after."""
    linears: tuple[nn.Module, ...]
    holders: list[Any]
    """For each stack the `ParametrizationList` that holds it."""
    fused: list[Fused]
    """Under `fuse_on="step"`: the weights and biases of the linears."""

    def __init__(self, group: FFNGroup, config: ExpertConfig, seed: int) -> None:
        super().__init__()
        self.group = group.name
        self.first_linear = next(iter(group.linears)).removeprefix(group.name).lstrip(".")
        self.config = config
        self.seed = seed
        self.handles: list[RemovableHandle] = []  # of hooks that serve this group
        self.given_ranks: Ranks | None = None  # by `wrap` or `fully_shard`
        self._ddp_ranks: Ranks | None = None  # of the DDP that has run the last forward
        self.was_loaded = False  # with the model's state dict
        self.starts_around_changed = False  # weights, which `wrap` has not made so
        self.is_in_custom_loop = False  # which no optimizer steps in, on "step"
        self.step_gradients: dict[nn.Parameter, Tensor] = {}  # of the last backward, on "step"
        # Kept out of the submodules: the linears own this module, not the reverse.
        self.__dict__.update(linears=tuple(group.linears.values()), holders=[], fused=[])
        self._register()

    def __getstate__(self) -> dict[str, Any]:
        """The state that a copy or a pickle includes."""
        return self.__dict__ | {"_ddp_ranks": None}

    def __setstate__(self, state: dict[str, Any]) -> None:  # deepcopy ends here
        super().__setstate__(state)
        self._register()

    def _register(self) -> None:
        for prepare in _on_creation:
            prepare()
        _live_groups[self] = None

    def new_tensor(self, *shape: int) -> Tensor:
        """Memory on the device of the group's first linear, in float32 at least."""
        weight = self.linears[0].get_parameter("weight")
        return torch.empty(shape, device=weight.device, dtype=accumulation_dtype(weight.dtype))

    def forward(self) -> Tensor:
        """The fusion weights to fuse with now, shape (N,)."""
        raise NotImplementedError

    def runs(self, place: PlaceInGroup) -> bool:
        """Whether `run` is the forward of a linear of the group, under "forward"."""
        return False

    def run(
        self, linear: nn.Module, x: Tensor, place: PlaceInGroup, run_dense: Callable[[], Any]
    ) -> Any:
        """The output of a linear for x; `run_dense` is the dense forward, on a fused weight."""
        return run_dense()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start over, as `wrap` does; the generator draws a router."""

    def generator(self, device: torch.device) -> torch.Generator | None:
        """For `reset_parameters`, with the same draws at each call."""
        return named_generator(self.seed, f"{self.group}.{self.drawn}", device)

    def fuse_stack(self, experts: Tensor) -> Tensor:
        """The fused tensor, shape (*S), of the stack `experts`, shape (N, *S)."""
        return functional.fuse(experts, self())

    def require_fusable(self) -> None:
        """Raise a ValueError unless there is one dense model to fuse to."""

    def reported(self) -> Tensor:
        """The fusion weights that `metrics` reports, shape (N,)."""
        return full_tensor(self())

    def start(self) -> Tensor:
        """The weights that upcycled experts are to fuse under, shape (N,), of non-zero sum."""
        return full_tensor(self())

    def own_tensors(self) -> list[Tensor]:
        """Parameters and buffers; quicker than by nn.Module's generators."""
        tensors = [*self._parameters.values(), *self._buffers.values()]
        return [tensor for tensor in tensors if tensor is not None]

    def current_weights(self) -> Tensor:
        """Under `fuse_on="step"`: the whole `w` to fuse with now, shape (N,), without a graph."""
        return self.forward().detach()  # without a forward's hooks, which are slow

    @property
    def ranks(self) -> Ranks:
        """The ranks that train the model together, see Note [Which ranks] in tensors/ranks.py."""
        self.follow_ddp()
        given, mesh = self.given_ranks or self._ddp_ranks, self._ranks_of_mesh()
        if given is not None:
            given = require_known(given, self.group)
        if mesh is not None:
            return mesh if given is None else mesh.joined(given)
        return all_ranks() if given is None else given

    def follow_ddp(self) -> None:
        """Remember whose forward runs now, if it is that of DDP."""
        if (ranks := ranks_of_ddp()) is not None:
            self._ddp_ranks = ranks

    def _ranks_of_mesh(self) -> Ranks | None:
        """Those of the first sharded parameter that the experts fuse into."""
        every = (fused.parameter for fused in self.fused)
        sharded = next((p for p in every if type(p) is not nn.Parameter), None)
        return None if sharded is None else ranks_of(sharded)

    @property
    def name(self) -> str:
        """Of the group in the model that was wrapped; two that share an FFN differ."""
        return f"{self.group}.{self.first_linear}".lstrip(".")

    def before_step(self) -> None:
        """An optimizer is about to step: decide which micro-batches its step applies."""

    def statistics(self, products: Tensor) -> Tensor:
        """Under `fuse_on="step"`: this rank's share of the step's statistics, to be summed.

        They have one dimension, and one shape on all ranks; `products` are `<E_i, G>` of this
        rank's share of the experts, shape (N,).
        """
        return products.new_empty(0)

    def gradients(self, sums: Tensor) -> dict[nn.Parameter, Tensor]:
        """Under `fuse_on="step"`: gradients of its own parameters, from statistics of all ranks."""
        return {}

    def follow_forward(
        self, linear: nn.Module, args: Any, kwargs: Any, output: Any = None
    ) -> Tensor | None:
        """Under `fuse_on="step"`: a hook on the first linear's forward.

        Eager quantization copies hooks and calls them without kwargs, so without an `output` here.
        """
        return None

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
        """Warn of what `health` found, on the CPU."""

    def end_forward(self) -> None:
        """The group's forward is over."""

    def remove_hooks(self) -> None:
        """Leave no hook behind; the group is about to be fused."""
        self.end_forward()
        _live_groups.pop(self, None)
        for handle in self.handles:
            handle.remove()

    def extra_repr(self) -> str:
        """What tells these fusion weights from others."""
        return f"{self.config.label}, num_experts={self.config.num_experts}, group={self.group!r}"

    def is_empty(self) -> bool:
        """Whether all fusion weights are zero, as in a bank before its first move."""
        return False

    def trained(self) -> list[nn.Parameter]:
        """The parameters that the experts learn through: their stacks, or what they fuse into."""
        return [*[fused.parameter for fused in self.fused], *self.expert_stacks()]

    def expert_stacks(self) -> list[nn.Parameter]:
        """The expert stacks that fuse with these weights."""
        return [holder.original for holder in self.holders]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusionWeights:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_low = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if is_low else moved

        has_lost = any(tensor.is_meta or leaves_memory_unset(fn) for tensor in self.own_tensors())
        super()._apply(keep_precision, recurse)
        if has_lost and not any(tensor.is_meta for tensor in self.own_tensors()):
            # Nothing else knows how to fill what has just got memory.
            self.reset_parameters(self.generator(self.own_tensors()[0].device))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        raise_precision(self)  # what `assign=True` has taken from a file in bfloat16
        self.was_loaded = True
