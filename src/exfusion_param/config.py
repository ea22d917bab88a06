"""The settings of an ExFusion parametrization."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

Variant = Literal["sw", "dw", "mb"]
ExpertInit = Literal["independent", "upcycle", "drop_upcycle"]
BankInit = Literal["zeros", "uniform"]
FuseOn = Literal["forward", "step"]
Displacement = Literal["own", "shared"]
ExpertDtype = Literal["model", "bfloat16"]

_CHOICES = {
    "variant": get_args(Variant),
    "expert_init": get_args(ExpertInit),
    "bank_init": get_args(BankInit),
    "fuse_on": get_args(FuseOn),
    "displacement": get_args(Displacement),
    "expert_dtype": get_args(ExpertDtype),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExFusionConfig:
    """What `wrap` attaches to a model. Immutable, checked when it is made.

    The defaults are the paper's: memory bank, 4 experts, momentum 0.95 (arXiv 2603.27965).

    Args:
        variant: where the fusion weights come from. `"sw"`: fixed at 1/N (Eq. 8); `"dw"`: a learned
            vector for each FFN group (Eq. 9); `"mb"`: a router's mean output, averaged over steps
            in a memory bank (Eq. 10, 11).
        num_experts: N, the experts of each linear, at least 2.
        momentum: delta of the memory bank, in [0, 1).
        shared_router: one router for each FFN group, on the FFN's input; otherwise one for each
            linear, on that linear's own input (Table IX). `"mb"` only.
        expert_init: `"independent"`: expert 0 keeps the model's own weight, the others are fresh
            draws of the same distribution; `"upcycle"`: every expert is the model's weight plus
            noise that leaves the fused weight as it was, for pretrained models; `"drop_upcycle"`:
            every expert is the model's weight, but for a share of the FFN's hidden units that are
            drawn anew (arXiv 2502.19261).
        upcycle_noise: standard deviation of that noise, as a share of the weight's own.
        drop_ratio: share of the hidden units that each expert draws anew, in (0, 1].
        bank_init: `"zeros"` (the paper: a warm-up, for training from scratch) or `"uniform"` (1/N,
            needed for pretrained weights). `"mb"` only.
        fuse_on: when the weights are fused: `"forward"`, at each use, as in the paper; `"step"`,
            once for each step of the optimizer, with the forward and backward of dense training.
        displacement: `"own"`: each expert moves by itself; `"shared"`: all experts of a linear move
            together from starting values that are frozen, at the cost of one dense weight
            (shared_displacement.py). With `fuse_on="step"` only.
        expert_dtype: what expert stacks are stored in: `"model"`, as the weights that they fuse to;
            `"bfloat16"`, with float32 weights, and rounded stochastically by `ExpertAdamW` or
            `ExpertSGD`. With `fuse_on="step"` and displacements of their own only.
        layers: indices of the FFN groups to wrap, in the order of the model; negative ones count
            from the end; None wraps all (Table X).
        seed: makes the experts and routers reproducible; None draws on torch's global generator.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value outside its range.
    """

    variant: Variant = "mb"
    num_experts: int = 4
    momentum: float = 0.95
    shared_router: bool = True
    expert_init: ExpertInit = "independent"
    upcycle_noise: float = 0.1
    drop_ratio: float = 0.5
    bank_init: BankInit = "zeros"
    fuse_on: FuseOn = "forward"
    displacement: Displacement = "own"
    expert_dtype: ExpertDtype = "model"
    layers: tuple[int, ...] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
        if self.displacement == "shared" and self.fuse_on != "step":
            raise ValueError('displacement="shared" needs fuse_on="step".')
        if self.expert_dtype != "model" and (self.fuse_on, self.displacement) != ("step", "own"):
            raise ValueError(
                f'expert_dtype="{self.expert_dtype}" needs fuse_on="step" and displacement="own".'
            )
        self._check_num_experts()
        self._check_numbers()
        self._check_layers()

    def _check_num_experts(self) -> None:
        _check_type("num_experts", self.num_experts, int)
        if self.num_experts < 2:
            raise ValueError(
                f"num_experts must be >= 2, got {self.num_experts}. Use the dense model instead."
            )

    def _check_numbers(self) -> None:
        _check_type("momentum", self.momentum, int, float)
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"momentum must be in [0, 1), got {self.momentum}. "
                "The paper uses 0.95; 0 uses each step's own fusion weights."
            )
        _check_type("upcycle_noise", self.upcycle_noise, int, float)
        if not 0 <= self.upcycle_noise < float("inf"):
            raise ValueError(f"upcycle_noise must be >= 0 and finite, got {self.upcycle_noise}.")
        _check_type("drop_ratio", self.drop_ratio, int, float)
        if not 0 < self.drop_ratio <= 1:
            raise ValueError(
                f"drop_ratio must be in (0, 1], got {self.drop_ratio}. "
                'For no new draws use expert_init="upcycle".'
            )
        if not isinstance(self.shared_router, bool):
            raise TypeError(f"shared_router must be a bool, got {self.shared_router!r}.")
        if self.seed is not None:
            _check_type("seed", self.seed, int)

    def _check_layers(self) -> None:
        if self.layers is None:
            return
        given: Any = self.layers
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise TypeError(f"layers must be a sequence of ints or None, got {given!r}.")
        layers = tuple(given)
        for index in layers:
            _check_type("layers", index, int)
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(
                f"layers must name at least one FFN group, each once, got {list(layers)}. "
                "Use None for all groups."
            )
        object.__setattr__(self, "layers", layers)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold; `from_dict` is the inverse."""
        fields = dataclasses.asdict(self)
        return fields | {"layers": None if self.layers is None else list(self.layers)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ExFusionConfig:
        """Make a config from `to_dict`'s fields; missing ones take their defaults.

        Raises:
            TypeError: a field is unknown or has the wrong type.
            ValueError: a field has a value outside its range.
        """
        return cls().replace(**fields)

    def replace(self, **fields: Any) -> ExFusionConfig:
        """A copy with some fields changed.

        Raises:
            TypeError: a field is unknown or has the wrong type.
            ValueError: a field has a value outside its range.
        """
        known = [field.name for field in dataclasses.fields(self)]
        if unknown := sorted(set(fields) - set(known)):
            raise TypeError(
                f"ExFusionConfig has no field {', '.join(unknown)}. "
                f"Its fields are {', '.join(known)}."
            )
        return dataclasses.replace(self, **fields)


def _check_type(name: str, value: object, *types: type) -> None:
    if isinstance(value, bool) or not isinstance(value, types):
        wanted = " or ".join(kind.__name__ for kind in types)
        raise TypeError(f"{name} must be {wanted}, got {value!r}.")
