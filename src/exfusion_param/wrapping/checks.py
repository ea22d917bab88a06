"""Errors of `wrap` and `fuse`, raised before they change anything.

Each check raises a ValueError that names the linears and the way out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..expert_config import ExpertConfig
from ..finding.discovery import FFNGroup
from ..finding.outer_modules import listed
from ..finding.projections import ADAPTED
from ..fusion.lookup import fused_names, fusion_weights_of, original, parametrized_names
from ..fusion.outside_access import require_sound
from ..fusion_weights.base import FusionWeights
from ..tensors.shards import is_sharded
from .attach import dense_tensors


def check_wrappable(model: nn.Module, groups: Sequence[FFNGroup], config: ExpertConfig) -> None:
    """Raise a ValueError unless every linear of the groups can be wrapped as the config says."""
    linears = {fqn: linear for group in groups for fqn, linear in group.linears.items()}
    _refuse_parallel_wrappers(model)
    for is_bad, problem in _NOT_WRAPPABLE:
        _refuse(linears, is_bad, problem)
    _refuse_tied(model, linears)
    if config.follows_inputs:
        _refuse(
            linears,
            lambda linear: isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear),
            "read without being called, so that a router sees no input. "
            'Use variant="sw" or "dw", or leave them out with filter_fn.',
        )
    if config.follows_inputs and config.fuse_on == "forward":
        _refuse(
            linears,
            lambda linear: "forward" in vars(linear),
            "given a forward of their own, past their class, so that a router sees no input. Set "
            'it after wrap(), or use fuse_on="step" (not for MEO).',
        )


def check_fusable(
    model: nn.Module, linears: Mapping[str, nn.Module], groups: Iterable[FusionWeights]
) -> None:
    """Raise a ValueError unless `fuse` can leave plain weights in all of the wrapped linears."""
    if not linears:
        raise ValueError(f"{type(model).__name__} has no wrapped linear, so nothing to fuse.")
    for group in groups:
        group.require_fusable()
        for fused in group.fused:
            fused.require_own()
    _refuse(
        linears,
        _is_offloaded,
        "offloaded by accelerate. Call accelerate.hooks.remove_hook_from_module(model, "
        "recurse=True) first.",
    )
    for linear in linears.values():
        for name in parametrized_names(linear):
            require_sound(linear, name)
    _refuse(
        linears,
        _has_shards,
        "sharded (DTensor). Take fused_state_dict(model), which gathers nothing.",
    )
    inside = set(map(id, linears.values()))
    for fqn, linear in linears.items():
        group = fusion_weights_of(linear)
        if any(id(other) not in inside for other in group.linears):
            raise ValueError(
                f"{fqn!r} shares its fusion weights with linears outside of "
                f"{type(model).__name__}. Fuse a module that holds all of {group.group!r}. If a "
                "linear was replaced after wrap(), as by modules_to_save of peft, put the wrapped "
                "one back, or load fused_state_dict(model) into a dense model."
            )
    _refuse_non_finite(linears)


def _has_shards(linear: nn.Module) -> bool:
    """Whether a parameter of the linear is a DTensor."""
    return any(map(is_sharded, linear.parameters()))


def _is_trainable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


def _is_offloaded(linear: nn.Module) -> bool:
    """Whether accelerate moves the linear's tensors to the device for each forward only."""
    return any(
        hasattr(module, "_hf_hook") and tensor.is_meta
        for module in linear.modules()
        for tensor in module.parameters(recurse=False)
    )


@torch.no_grad()
def _refuse_non_finite(linears: Mapping[str, nn.Module]) -> None:
    fused = {
        f"{fqn}.{name}": [_source(linear, name), fusion_weights_of(linear)()]
        for fqn, linear in linears.items()
        for name in fused_names(linear)
    }
    named = [name for name, sources in fused.items() if not all(map(_is_finite, sources))]
    if not named:
        return
    raise ValueError(
        f"{listed(named)}: the experts or their fusion weights hold NaN or inf. "
        "Load the last good checkpoint before fusing."
    )


def _source(linear: nn.Module, name: str) -> Tensor:
    """What a tensor is fused from; under `fuse_on="step"` it is fused already."""
    if name in parametrized_names(linear):
        return original(linear, name)
    return linear.get_parameter(name)


def _is_finite(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return torch.tensor(True)
    return torch.isfinite(tensor).all()


def _refuse(
    linears: Mapping[str, nn.Module], is_bad: Callable[[nn.Module], bool], problem: str
) -> None:
    if bad := [fqn for fqn, linear in linears.items() if is_bad(linear)]:
        raise ValueError(f"{listed(bad)}: {'is' if len(bad) == 1 else 'are'} {problem}")


_NOT_WRAPPABLE: tuple[tuple[Callable[[nn.Module], bool], str], ...] = (
    (
        lambda linear: bool(fused_names(linear)),
        "already wrapped. Call fuse(model) first, or leave them out with filter_fn or layers.",
    ),
    (
        lambda linear: ADAPTED in dict(linear.named_children()),
        "inside an adapter (peft). Merge it first, model.merge_and_unload(); or wrap before peft, "
        "and call fuse(model) before merging.",
    ),
    (_is_offloaded, "offloaded by accelerate. Wrap first, offload after."),
    (is_parametrized, "parametrized by something else. Remove that first."),
    (
        lambda linear: not isinstance(linear.weight, nn.Parameter),
        "without a weight parameter: something computes it. Remove pruning or norms first, by "
        "torch.nn.utils.prune.remove, remove_weight_norm or remove_spectral_norm. Wrap before FSDP "
        "shards them.",
    ),
    (
        _has_shards,
        "sharded (DTensor). Wrap first, shard after; have from_pretrained load the model without "
        'tp_plan. Tensor parallelism of wrapped linears needs fuse_on="step".',
    ),
    (
        lambda linear: any(type(t.data) is not Tensor for t in dense_tensors(linear).values()),
        "converted to a tensor subclass, as torchao does. Wrap before converting.",
    ),
    (
        lambda linear: not all(map(_is_trainable, dense_tensors(linear).values())),
        "not of a floating dtype of 16 bits or more, and experts are trained. Wrap before "
        "quantizing, or leave them out with filter_fn or layers.",
    ),
    (
        lambda linear: any(not t.requires_grad for t in dense_tensors(linear).values()),
        "frozen. Set requires_grad of weight and bias before wrapping, and freeze after it; or "
        "leave them out with filter_fn or layers.",
    ),
)


def _refuse_tied(model: nn.Module, linears: Mapping[str, nn.Module]) -> None:
    owners: dict[int, list[str]] = defaultdict(list)
    for fqn, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            owners[id(tensor)].append(f"{fqn}.{name}".removeprefix("."))
    tied = [
        owners[id(tensor)]
        for linear in linears.values()
        for tensor in dense_tensors(linear).values()
        if len(owners[id(tensor)]) > 1
    ]
    if tied:
        raise ValueError(
            f"{' is tied to '.join(tied[0])}: a stack in one of them would change the other. "
            "Untie them, or leave them out with filter_fn."
        )


def _refuse_parallel_wrappers(model: nn.Module) -> None:
    wrappers = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")
    for module in model.modules():
        if type(module).__name__ in wrappers:
            raise ValueError(
                f"The model is inside {type(module).__name__} already, which manages its dense "
                "parameters. Call wrap(model) first."
            )
