"""The settings that all methods share, and the behavior of settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self, get_args

ExpertInit = Literal["independent", "upcycle", "drop_upcycle"]
FuseOn = Literal["forward", "step"]

ENTRY = "exfusion"
"""The key of the settings in config.json, or in a torch file beside its tensors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """Settings of the experts. Immutable, checked when it is made.

    `ExFusionConfig` and `MEOConfig` say what each field is.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value outside its range.
    """

    num_experts: int = 4
    expert_init: ExpertInit = "independent"
    upcycle_noise: float = 0.1
    drop_ratio: float = 0.5
    layers: tuple[int, ...] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        self._check_choice("expert_init", get_args(ExpertInit))
        self._check_count("num_experts", 2, "Use the dense model instead.")
        self._check_init()
        self._check_layers()
        if self.seed is not None:
            check_type("seed", self.seed, int)

    def _check_choice(self, name: str, choices: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")

    def _check_count(self, name: str, least: int, way_out: str = "") -> None:
        value = getattr(self, name)
        check_type(name, value, int)
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}. {way_out}".rstrip())

    def _check_scale(self, name: str) -> None:
        value = getattr(self, name)
        check_type(name, value, int, float)
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be >= 0 and finite, got {value}.")

    def _check_bool(self, name: str) -> None:
        if not isinstance(value := getattr(self, name), bool):
            raise TypeError(f"{name} must be a bool, got {value!r}.")

    def _check_init(self) -> None:
        self._check_scale("upcycle_noise")
        check_type("drop_ratio", self.drop_ratio, int, float)
        if not 0 < self.drop_ratio <= 1:
            raise ValueError(
                f"drop_ratio must be in (0, 1], got {self.drop_ratio}. "
                'For no new draws use expert_init="upcycle".'
            )

    def _check_layers(self) -> None:
        if self.layers is None:
            return
        given: Any = self.layers
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise TypeError(f"layers must be a sequence of ints or None, got {given!r}.")
        layers = tuple(given)
        for index in layers:
            check_type("layers", index, int)
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
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Make a config from `to_dict`'s fields; missing ones take their defaults.

        Raises:
            TypeError: a field is unknown or has the wrong type.
            ValueError: a field has a value outside its range.
        """
        return cls().replace(**fields)

    def replace(self, **fields: Any) -> Self:
        """A copy with some fields changed.

        Raises:
            TypeError: a field is unknown or has the wrong type.
            ValueError: a field has a value outside its range.
        """
        known = [field.name for field in dataclasses.fields(self)]
        if unknown := sorted(set(fields) - set(known)):
            raise TypeError(
                f"{type(self).__name__} has no field {', '.join(unknown)}. "
                f"Its fields are {', '.join(known)}."
            )
        return dataclasses.replace(self, **fields)

    @classmethod
    def resolve(cls, config: Self | None, fields: Mapping[str, Any]) -> Self:
        """The config with some fields replaced; the default one if it is None.

        Raises:
            TypeError: it is another kind of config, or a field is unknown or has the wrong type.
            ValueError: a field has a value outside its range.
        """
        if config is not None and not isinstance(config, cls):
            name = cls.__name__
            article = "an" if name[0] in "AEIOU" else "a"
            raise TypeError(
                f"config must be {article} {name} or None, got {type(config).__name__}."
            )
        return (config or cls()).replace(**fields)

    @property
    def label(self) -> str:
        """The method and its variant, in a word or two."""
        raise NotImplementedError

    # What not every method leaves open:

    @property
    def fuse_on(self) -> FuseOn:
        """When the weights are fused."""
        return "forward"

    @property
    def shares_fusion_weights(self) -> bool:
        """Whether the linears of an FFN have the same fusion weights."""
        return True

    @property
    def ships_dense(self) -> bool:
        """Whether a trained model can be fused to a dense one."""
        return True

    @property
    def follows_inputs(self) -> bool:
        """Whether fusion weights depend on the inputs of the linears."""
        return True


def check_type(name: str, value: object, *types: type) -> None:
    """Raise a TypeError unless a field has one of some types; a bool is not a number."""
    if isinstance(value, bool) or not isinstance(value, types):
        wanted = " or ".join(kind.__name__ for kind in types)
        raise TypeError(f"{name} must be {wanted}, got {value!r}.")
