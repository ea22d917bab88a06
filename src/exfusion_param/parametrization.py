"""The parametrization that turns the weight of a linear into a weighted sum of experts.

Formula: `W = sum_i w_i E_i` and `b = sum_i w_i b_i` (Eq. 7), so that `W x + b` is the weighted sum
of the experts' outputs. Nothing but the weight changes: the linear stays in its place, is called as
before, and sees a weight of its usual shape.

Storage: `linear.parametrizations.weight.original` is the stack `E`, shape (N, out, in), and
`linear.parametrizations.bias.original` is (N, out). The group's fusion weights belong to its first
linear, as `parametrizations.weight[0].fusion_weights`; the other parametrizations refer to them.

Cost: one pass over the stack at each use of the weight, another in backward. The forward and
backward of the linear are those of the dense one.

The class that the linear gets is in linear_class.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .expert_fusion import ExpertFusion
from .finding.outer_modules import clean_name
from .finding.place import PlaceInGroup
from .fusion_weights.base import Fused, FusionWeights, living
from .linear_class import dense_order, share_class
from .tensors import shards


def attach(
    linear: nn.Module,
    fusion_weights: FusionWeights,
    stacks: Mapping[str, Tensor],
    place: PlaceInGroup,
) -> None:
    """Parametrize a linear's tensors with expert stacks.

    Args:
        linear: the module.
        fusion_weights: the group's fusion weights.
        stacks: the expert stack for each tensor's name.
        place: the linear's place in the group.
    """
    order = tuple(name for name, _ in linear.named_parameters(recurse=False))
    for name, experts in stacks.items():
        owns_weights = place.is_first and name == "weight"
        fusion = ExpertFusion(fusion_weights, experts, owns_weights)
        parametrize.register_parametrization(linear, name, fusion, unsafe=True)
        holder = linear.get_submodule(f"parametrizations.{name}")
        fusion_weights.fusions.append((holder, fusion))
        original(linear, name).grad = None
    share_class(linear, order, fusion_weights.forward_of(place))


def detach(linear: nn.Module) -> None:
    """Leave the fused tensors as the linear's own parameters, in their first order."""
    if not _parametrized_names(linear):  # they are
        return
    order, fused, weights = dense_order(linear), fused_names(linear), fusion_weights_of(linear)
    for name in fused:
        fusion = fusion_of(linear, name)
        parametrize.remove_parametrizations(linear, name, leave_parametrized=True)
        weights.fusions[:] = [entry for entry in weights.fusions if entry[1] is not fusion]
        linear.get_parameter(name).grad = None  # it has the stack's shape
    own = dict(linear.named_parameters(recurse=False))
    for name in filter(own.__contains__, order):  # removal puts them behind what was not fused
        parameter = own[name]
        delattr(linear, name)
        linear.register_parameter(name, parameter)


def dense_tensors(linear: nn.Module) -> dict[str, nn.Parameter]:
    """The tensors of a dense linear that `attach` replaces: the weight, and the bias if it has one.

    A subclass may have further parameters; Eq. 7 holds for these two.
    """
    own = dict(linear.named_parameters(recurse=False))
    return {name: own[name] for name in ("weight", "bias") if name in own}


def original(linear: nn.Module, name: str) -> nn.Parameter:
    """The expert stack behind a fused tensor."""
    return linear.get_parameter(f"parametrizations.{name}.original")


def fused_tensor(linear: nn.Module, name: str) -> Tensor:
    """A copy of the fused tensor as the experts have it now; a DTensor if they are."""
    if not parametrize.is_parametrized(linear, name):
        return linear.get_parameter(name).detach().clone()
    stack = original(linear, name)
    if shards.is_sharded(stack):
        return fusion_of(linear, name).dense(stack)
    fused: Tensor = getattr(linear, name)
    return fused


def fusion_of(linear: nn.Module, name: str) -> ExpertFusion:
    """The parametrization of a fused tensor."""
    fusion = linear.get_submodule(f"parametrizations.{name}.0")
    assert isinstance(fusion, ExpertFusion)
    return fusion


def wrapped_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The wrapped linears by their names in the model."""
    by_step = _weights_by_step()
    return {
        fqn: module
        for fqn, module in model.named_modules()
        if id(module) in by_step or _parametrized_names(module)
    }


def fusion_weights_of(linear: nn.Module) -> FusionWeights:
    """The fusion weights of a wrapped linear."""
    if not _parametrized_names(linear):
        return _weights_by_step()[id(linear)]
    weights = linear.get_submodule("parametrizations.weight.0").fusion_weights
    assert isinstance(weights, FusionWeights)
    return weights


def groups_of(model: nn.Module) -> dict[FusionWeights, str]:
    """The fusion weights of a model's wrapped linears, each with its FFN group's name in it."""
    names: dict[FusionWeights, str] = {}
    first_of: dict[FusionWeights, str] = {}
    by_step = _weights_by_step()
    for fqn, linear in wrapped_linears(model).items():
        weights = by_step.get(id(linear)) or fusion_weights_of(linear)
        fqn = clean_name(fqn)
        if linear is weights.linears[0]:
            names[weights] = fqn.removesuffix(weights.first_linear).rstrip(".")
            first_of[weights] = fqn
        else:
            names.setdefault(weights, weights.group)
    taken = Counter(names.values())  # siblings that were wrapped apart have one parent
    return {
        weights: name if taken[name] == 1 else first_of.get(weights, f"{name}.{i}")
        for i, (weights, name) in enumerate(names.items())
    }


def fused_parameter(parameter: nn.Parameter) -> Fused | None:
    """What is known of a parameter that is fused at each step; None for any other."""
    every = (fused for weights in living() for fused in weights.fused)
    return next((fused for fused in every if fused.parameter is parameter), None)


def fused_names(linear: nn.Module) -> list[str]:
    """The names of the tensors that are fused, such as ["weight", "bias"]."""
    if names := _parametrized_names(linear):
        return names
    weights = _weights_by_step().get(id(linear))
    return [] if weights is None else [f.name for f in weights.fused if f.linear is linear]


def _parametrized_names(linear: nn.Module) -> list[str]:
    if not parametrize.is_parametrized(linear):
        return []
    lists = linear.get_submodule("parametrizations").named_children()
    return [name for name, fusions in lists if isinstance(fusions[0], ExpertFusion)]  # type: ignore[index]


def _weights_by_step() -> dict[int, FusionWeights]:
    """The fusion weights of all linears that live under `fuse_on="step"`, by the linears' ids."""
    return {id(fused.linear): weights for weights in living() for fused in weights.fused}
