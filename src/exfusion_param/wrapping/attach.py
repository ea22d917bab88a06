"""How a linear gets its expert stacks, and gives them back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..finding.place import PlaceInGroup
from ..fusion.expert_fusion import ExpertFusion
from ..fusion.linear_class import dense_order, share_class
from ..fusion.lookup import fused_names, fusion_weights_of, original, parametrized_names
from ..fusion_weights.base import FusionWeights
from ..fusion_weights.memory_bank import MemoryBank
from ..step.custom_loops import CustomLoopCheck
from ..step.refusals import outdate


def attach(
    linear: nn.Module,
    fusion_weights: FusionWeights,
    stacks: Mapping[str, Tensor],
    place: PlaceInGroup,
) -> None:
    """Parametrize a linear's tensors with expert stacks."""
    order = tuple(name for name, _ in linear.named_parameters(recurse=False))
    for name, experts in stacks.items():
        owns_weights = place.is_first and name == "weight"
        fusion = ExpertFusion(fusion_weights, experts, owns_weights)
        parametrize.register_parametrization(linear, name, fusion, unsafe=True)
        fusion_weights.holders.append(linear.get_submodule(f"parametrizations.{name}"))
        original(linear, name).grad = None
        if fusion_weights.own_tensors():
            _take_place_of(linear, name)
    share_class(linear, order, place if fusion_weights.runs(place) else None)
    if place.is_first and isinstance(fusion_weights, MemoryBank):
        fusion_weights.check = CustomLoopCheck(fusion_weights)


def _take_place_of(linear: nn.Module, name: str) -> None:
    """Let the stack be another parameter than the dense tensor, which torch has made it of.

    An optimizer that was made before `wrap` would train it, without routers and learned weights.
    """
    dense = original(linear, name)
    stack = nn.Parameter(dense.detach(), dense.requires_grad)
    linear.get_submodule(f"parametrizations.{name}").register_parameter("original", stack)
    outdate([dense], "wrap()")


def detach(linear: nn.Module) -> None:
    """Leave the fused tensors as the linear's own parameters, in their first order."""
    if not parametrized_names(linear):  # they are
        return
    order, fused, group = dense_order(linear), fused_names(linear), fusion_weights_of(linear)
    for name in fused:
        holder = linear.get_submodule(f"parametrizations.{name}")
        parametrize.remove_parametrizations(linear, name, leave_parametrized=True)
        group.holders.remove(holder)
        linear.get_parameter(name).grad = None  # it has the stack's shape
    linear._parameters = dict(linear._parameters)  # see refused_edits.py
    held = dict(linear.named_parameters(recurse=False))
    for name in filter(held.__contains__, order):  # removal puts them behind what was not fused
        parameter = held[name]
        delattr(linear, name)
        linear.register_parameter(name, parameter)


def dense_tensors(linear: nn.Module) -> dict[str, nn.Parameter]:
    """The tensors of a dense linear that `attach` replaces: the weight, and the bias if it has one.

    A subclass may have further parameters; Eq. 7 holds for these two.
    """
    held = dict(linear.named_parameters(recurse=False))
    return {name: held[name] for name in ("weight", "bias") if name in held}
