"""Dense state dicts out of and into a wrapped model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .fusion.linear_class import dense_order
from .fusion.lookup import (
    dense_shape,
    fused_names,
    fused_tensor,
    fusion_weights_of,
    groups_of,
    original,
    parametrized_names,
    wrapped_linears,
)
from .fusion_weights.empty_banks import warn_of_empty_banks
from .step.expert_step import refuse_half_done
from .tensors.expert_starts import upcycled_experts
from .tensors.shards import assign, full_tensor, spread


class IncompatibleKeys(NamedTuple):
    """The keys that did not match, as `nn.Module.load_state_dict` returns them."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class _Fused(NamedTuple):
    """A tensor of the dense model that is fused from a stack in the wrapped one."""

    linear: nn.Module
    name: str


@torch.no_grad()
def fused_state_dict(model: nn.Module) -> OrderedDict[str, Any]:
    """Return the dense state dict that `fuse(model)` would produce, without changing the model.

    Args:
        model: a wrapped model, in training or eval mode. Memory banks are used in their current
            state.

    Returns:
        The dense tensors under the keys of the dense model, in its order. Tensors that are not
        fused share memory with the model, as in `state_dict()`. For a sharded model these are
        DTensors: each rank fuses its own part, and only fusion weights are gathered.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        >>> model = exf.wrap(model, variant="sw")
        >>> dense = exf.fused_state_dict(model)
        >>> {name: tuple(tensor.shape) for name, tensor in dense.items()}
        {'0.weight': (16, 8), '0.bias': (16,), '2.weight': (8, 16), '2.bias': (8,)}
    """
    groups = groups_of(model)
    for group in groups:
        group.require_fusable()
        for fused in group.fused:
            fused.require_own()
    refuse_half_done(groups)
    warn_of_empty_banks(groups)
    return OrderedDict(
        (key, fused_tensor(value.linear, value.name) if isinstance(value, _Fused) else value)
        for key, value in _dense_view(model).items()
    )


@torch.no_grad()
def load_dense_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    *,
    strict: bool = True,
    generator: torch.Generator | None = None,
) -> IncompatibleKeys:
    """Load a dense checkpoint into a wrapped model.

    The experts are upcycled: each becomes the weight of the checkpoint plus noise that leaves the
    fused weight unchanged (`config.upcycle_noise`). Under `fuse_on="step"`, experts that an
    optimizer already holds are instead shifted along with their weight. Fusion weights, routers and
    memory banks of the FFN groups in the checkpoint are reset. A bank that is reset to zeros warns,
    because it scales the loaded weights to zero.

    Args:
        model: a wrapped model.
        state_dict: tensors under the keys of the dense model. For a sharded model, either full
            tensors on every rank, or DTensors like those of the model. The fusion weights that the
            state dict of a model under `fuse_on="step"` has in addition are left out.
        strict: whether missing and unexpected keys raise an error.
        generator: draws the noise and the routers; None uses torch's global generator.

    Returns:
        The missing and the unexpected keys; both lists are empty if `strict`.

    Raises:
        ValueError: keys or shapes do not match. The model is then unchanged.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        >>> dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        >>> model = exf.wrap(model, variant="sw")
        >>> exf.load_dense_state_dict(model, dense)
        IncompatibleKeys(missing_keys=[], unexpected_keys=[])
        >>> torch.allclose(model[0].weight, dense["0.weight"])
        True
    """
    dense = _dense_view(model)
    keys = IncompatibleKeys(
        [key for key in dense if key not in state_dict],
        [key for key in state_dict if key not in dense and not _is_of_fusion_weights(key)],
    )
    _check_dense(dense, state_dict, keys, strict)
    given = {key: state_dict[key] for key in dense if key in state_dict}
    fused = {key: value for key, value in dense.items() if isinstance(value, _Fused)}
    touched = dict.fromkeys(fusion_weights_of(fused[key].linear) for key in given if key in fused)
    starts = {
        value: given[key] if key in given else fused_tensor(value.linear, value.name)
        for key, value in fused.items()
        if fusion_weights_of(value.linear) in touched
    }
    for group in touched:
        group.reset_parameters(generator)
    for value, tensor in starts.items():
        _start_from(value, tensor, generator)
    plain = {
        key: spread(given[key], tensor) if isinstance(tensor, Tensor) else given[key]
        for key, tensor in dense.items()
        if key in given and not isinstance(tensor, _Fused)
    }
    model.load_state_dict(plain, strict=False)
    for group in touched:
        group.was_loaded = False  # experts start around these weights on purpose
    warn_of_empty_banks(touched)
    return keys


def _is_of_fusion_weights(key: str) -> bool:
    """Whether a key is one that a model under `fuse_on="step"` has beside the dense ones."""
    return "fusion_weights" in key.split(".") and "parametrizations" not in key.split(".")


def dense_keys(model: nn.Module) -> list[str]:
    """The keys of the tensors in `fused_state_dict(model)`."""
    dense = _dense_view(model)
    return [key for key, value in dense.items() if isinstance(value, (Tensor, _Fused))]


def _dense_view(model: nn.Module) -> OrderedDict[str, Tensor | _Fused]:
    """The dense model's keys in its order, each with its tensor or where to fuse it."""
    for group in groups_of(model):
        group.end_forward()  # a training forward that was cut short may have left its own
    kept = model.state_dict(keep_vars=True)
    linear_at = _linears_by_prefix(kept, model)
    dense: OrderedDict[str, Tensor | _Fused] = OrderedDict()
    groups = [group for group in groups_of(model) if group.fused]
    by_step = {
        id(fused.parameter): _Fused(fused.linear, fused.name)
        for group in groups
        for fused in group.fused
    }
    taken_off = {id(tensor) for group in groups for tensor in group.own_tensors()}
    state = {k: v.detach() if isinstance(v, Tensor) else v for k, v in kept.items()}
    for key, value in kept.items():
        if id(value) in taken_off:
            continue
        if id(value) in by_step:
            dense[key] = by_step[id(value)]
            continue
        prefix, is_ours, _ = key.partition("parametrizations.")
        if not is_ours:
            prefix = key[: key.rfind(".") + 1]
        linear = linear_at.get(prefix)
        if linear is None or not (is_ours or key[len(prefix) :] in dense_order(linear)):
            dense[key] = state[key]
            continue
        for name in dense_order(linear):
            is_fused = name in fused_names(linear)
            dense[prefix + name] = _Fused(linear, name) if is_fused else state[prefix + name]
    return dense


def _linears_by_prefix(kept: Mapping[str, Any], model: nn.Module) -> dict[str, nn.Module]:
    """The wrapped linears by what their keys in the state dict begin with.

    Not by the names of modules: `checkpoint_wrapper` of torch, for one, leaves its own out of keys.
    """
    stacks = {
        id(original(linear, name)): (linear, f"parametrizations.{name}.original")
        for linear in wrapped_linears(model).values()
        for name in parametrized_names(linear)
    }
    return {
        key.removesuffix(stacks[id(value)][1]): stacks[id(value)][0]
        for key, value in kept.items()
        if id(value) in stacks
    }


def _check_dense(
    dense: Mapping[str, Tensor | _Fused],
    state_dict: Mapping[str, Any],
    keys: IncompatibleKeys,
    strict: bool,
) -> None:
    problems = []
    if strict and keys.missing_keys:
        problems.append(f"missing keys: {', '.join(keys.missing_keys)}")
    if strict and keys.unexpected_keys:
        problems.append(f"unexpected keys: {', '.join(keys.unexpected_keys)}")
    for key in dense.keys() & state_dict.keys():
        ours, theirs = _shape(dense[key]), getattr(state_dict[key], "shape", None)
        if ours != theirs:
            problems.append(f"{key} has shape {_text(theirs)}, the model {_text(ours)}")
    if problems:
        raise ValueError(
            f"The state dict does not fit the dense form of the model: {'; '.join(problems)}. "
            "A wrapped model's own checkpoint loads with model.load_state_dict."
        )


def _start_from(fused: _Fused, tensor: Tensor, generator: torch.Generator | None) -> None:
    group = fusion_weights_of(fused.linear)
    if group.fused:  # experts follow what is written
        parameter = fused.linear.get_parameter(fused.name)
        assign(parameter, full_tensor(tensor).to(parameter.device, parameter.dtype))
        return
    stack = original(fused.linear, fused.name)
    tensor = full_tensor(tensor).to(stack.device, stack.dtype)
    noise = group.config.upcycle_noise
    assign(stack, upcycled_experts(tensor, group.start(), noise, generator))


def _shape(value: Any) -> torch.Size | None:
    if isinstance(value, _Fused):
        return dense_shape(value.linear, value.name)
    return getattr(value, "shape", None)


def _text(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(tuple(shape))
