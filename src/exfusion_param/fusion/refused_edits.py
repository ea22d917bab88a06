"""What code that edits a wrapped linear itself is told: weight and bias are not its parameters.

`functional_call` swaps tensors by name; old-style `torch.nn.utils.weight_norm` and `spectral_norm`
take the weight out of the linear's dict of parameters; eager quantization sets a `qconfig`; tensor
parallelism asks whether the linear is split already; others delete the attribute. Each is refused
where it begins, with the linear as it was, but for `remove_parametrizations` of the weight only,
which the next forward refuses.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

_FUSED = ("weight", "bias")


class OwnParameters(dict[str, Any]):
    """The dict of parameters of a wrapped linear, which lacks what is fused."""

    def __missing__(self, name: str) -> NoReturn:
        if name in _FUSED:
            raise KeyError(_text(name))
        raise KeyError(name)

    def __delitem__(self, name: str) -> None:
        if name in _FUSED and name not in self:
            raise KeyError(_text(name))
        super().__delitem__(name)


def refuse_deletion(name: str) -> NoReturn:
    """Raise for `del linear.weight`."""
    raise AttributeError(_text(name))


def refuse_functional_call(name: str) -> None:
    """Raise if `torch.func.functional_call` assigns; it takes back what it read, not the experts.

    It sets a tensor that is not in a module's dicts as any other code does. The only sign of it is
    the frame that it is done in.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") in _SETTERS:
        frame = frame.f_back
    if frame.f_globals.get("__name__") == "torch.nn.utils._named_member_accessor":
        raise RuntimeError(
            f"functional_call with the dense name of a fused {name} would write to the experts for "
            "good. Call it with the names of model.named_parameters(), or on a fused copy, "
            "fuse(copy.deepcopy(model))."
        )


_SETTERS = (
    *(f"{__package__}.{module}" for module in ("refused_edits", "outside_access", "linear_class")),
    "torch.nn.modules.module",
)


def half_removed(linear: Any) -> RuntimeError:
    """The error for a linear whose bias is still fused and whose weight is not any more."""
    return RuntimeError(
        f"The weight of a wrapped {type(linear).__bases__[0].__name__} was taken from its experts "
        "by remove_parametrizations, and its bias is still fused. Call exfusion_param.fuse(model) "
        "instead of it; or let it take weight and bias of all linears of the FFN."
    )


def qconfig_property() -> property:
    """The attribute by which eager quantization chooses a linear; None is let pass."""

    def get(self: Any) -> NoReturn:
        raise AttributeError("qconfig")

    def set_one(self: Any, value: Any) -> None:
        if value is not None:
            raise TypeError(
                "A wrapped linear cannot be quantized: its weight is fused from experts at each "
                'access. Call fuse(model) first, or wrap with fuse_on="step" (not for MEO).'
            )

    return property(get, set_one)


def split_property() -> property:
    """The attribute, of a private name, that torch's `distribute_module` reads before it splits."""

    def get(self: Any) -> NoReturn:
        if sys._getframe(1).f_globals.get("__name__") != "torch.distributed.tensor._api":
            raise AttributeError("_distribute_module_applied")
        raise TypeError(
            "Tensor parallelism cannot split a linear that fuses at each forward; wrap with "
            'fuse_on="step", or leave the wrapped linears out of the plan.'
        )

    return property(get)


def _text(name: str) -> str:
    return (
        f"{name!r} is not a parameter of the wrapped linear but fused from experts at each access, "
        f"so it cannot be taken out, as weight_norm and spectral_norm do. Call fuse(model) first."
    )
