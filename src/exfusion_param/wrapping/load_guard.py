"""Errors and warnings of a wrapped model's `load_state_dict`, before it copies anything."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..fusion.lookup import fused_names, parametrized_names
from ..fusion_weights.base import FusionWeights


def guard_loading(model: nn.Module, group: FusionWeights, linears: Mapping[str, nn.Module]) -> None:
    """Let `model.load_state_dict` refuse what does not fit the experts, and then change nothing."""
    count = group.config.num_experts
    guard = _LoadGuard([f"{fqn}.".lstrip(".") for fqn in linears], count)
    group.handles.append(model.register_load_state_dict_pre_hook(guard))
    for linear in linears.values():  # for `load_state_dict` of a module within the model
        hook = linear.register_load_state_dict_pre_hook(_LoadGuard([""], count))
        group.handles.append(hook)
        group.handles.append(linear.register_load_state_dict_pre_hook(_warn_of_other_weights))


def _warn_of_other_weights(
    linear: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: Any
) -> None:
    """Warn of experts without the fusion weights that they were trained with; a hook.

    torch tells no hook whether keys may be missing. If they may not, it raises later.
    """
    if f"{prefix}parametrizations.weight.original" not in state_dict:
        return
    mark = f"{prefix}parametrizations.weight.0.fusion_weights."
    tensors = itertools.chain(linear.named_parameters(), linear.named_buffers())
    own = {f"{prefix}{name}".removeprefix(mark) for name, _ in tensors if mark in prefix + name}
    given = {name.removeprefix(mark) for name in state_dict if name.startswith(mark)}
    if own != given:
        warnings.warn(
            f"The state dict has experts with the fusion weights {sorted(given) or 'of sw'}, and "
            f"the model has {sorted(own) or 'those of sw'}. It keeps its own, so that it fuses to "
            "other weights than the ones that were saved. Save the whole state_dict(), as banks "
            "are buffers, and load it into a model that is wrapped in the same way.",
            stacklevel=2,
        )


class _LoadGuard:
    """A hook that refuses dense checkpoints and stacks of another number of experts.

    torch copies what fits before it reports what does not, so the check comes first. It holds only
    names, for a deepcopy of the model to take along.
    """

    def __init__(self, prefixes: list[str], num_experts: int) -> None:
        self.prefixes = prefixes
        self.num_experts = num_experts

    def __call__(
        self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: Any
    ) -> None:
        for name in (prefix + linear for linear in self.prefixes):
            try:
                linear = module.get_submodule(name.removeprefix(prefix).rstrip("."))
            except AttributeError:  # taken out of the model since
                continue
            for tensor in fused_names(linear):
                stack = f"{name}parametrizations.{tensor}.original"
                if not parametrized_names(linear):
                    _refuse_stacks(state_dict, stack)
                    continue
                self._check(state_dict, f"{name}{tensor}", stack)
                if stack not in state_dict:  # some are left out with strict=False
                    _refuse_renamed(module, state_dict, prefix, stack)

    def _check(self, state_dict: Mapping[str, Any], dense: str, wrapped: str) -> None:
        stack = state_dict.get(wrapped)
        if stack is None and dense in state_dict:
            raise ValueError(
                f"{dense} is dense, and the model is wrapped. Load this state dict with "
                "exfusion_param.load_dense_state_dict(model, state_dict), or before wrap()."
            )
        if isinstance(stack, Tensor) and stack.shape[:1] != (self.num_experts,):
            given = stack.shape[0] if stack.ndim else 0
            raise ValueError(
                f"{wrapped} has {given} experts, but the model has {self.num_experts}. "
                f"Wrap the model with num_experts={given}."
            )


def _refuse_stacks(state_dict: Mapping[str, Any], stack: str) -> None:
    """Raise if experts are given to a model that has none, which strict=False would leave out."""
    if stack in state_dict:
        raise ValueError(
            f'{stack} was saved under fuse_on="forward", and the model is wrapped with '
            'fuse_on="step". Load the state dict into a model that is wrapped with "forward", and '
            "its exfusion_param.fused_state_dict into this one with load_dense_state_dict."
        )


def _refuse_renamed(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, missing: str
) -> None:
    """Raise if stacks are there under names that the module lacks, as a trainer may save them."""
    known = {prefix + name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name in state_dict:
        is_stack = ".parametrizations." in name and name.endswith(".original")
        if is_stack and name.startswith(prefix) and name not in known:
            raise ValueError(
                f"The state dict has no {missing}, but a stack {name} that the model lacks: it was "
                f"saved under other names. {_way_out(name, missing)}"
            )


def _way_out(name: str, missing: str) -> str:
    """How to give a state dict the model's names, one of which differs in it."""
    added = [outer for outer in ("module.", "_orig_mod.") if outer in name]
    renamed = functools.reduce(lambda text, outer: text.replace(outer, ""), added, name)
    if renamed == missing:
        change = "".join(f".replace({outer!r}, '')" for outer in added)
        return f"Load {{name{change}: tensor for name, tensor in state_dict.items()}}."
    return (
        "Save a wrapped model of transformers with save_pretrained(folder, "
        "save_original_format=False); ExFusionTrainerMixin does."
    )
