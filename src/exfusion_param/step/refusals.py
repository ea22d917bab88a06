"""Errors that are raised before an optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn, optim

from ..fusion_weights.base import FusionWeights
from ..fusion_weights.votes.custom_ops import current_backward

_OUTDATED = "_exfusion_outdated_by"
"""The attribute of a parameter that another one has taken the place of: the call that did it."""


def refuse_closures(optimizer: optim.Optimizer, groups: Sequence[FusionWeights]) -> None:
    """Raise for optimizers whose step evaluates the model several times."""
    if groups and isinstance(optimizer, optim.LBFGS):
        raise RuntimeError(
            f"{type(optimizer).__name__} evaluates the model within its step, which the experts of "
            f'{groups[0].group!r} cannot follow under fuse_on="step". Wrap with fuse_on="forward".'
        )


def outdate(parameters: Iterable[nn.Parameter], call: str) -> None:
    """Refuse optimizers that hold these parameters, which others have taken the place of.

    Args:
        parameters: of before.
        call: what has put others in their place.
    """
    for parameter in parameters:
        setattr(parameter, _OUTDATED, call)


def refuse_outdated(optimizer: optim.Optimizer) -> None:
    """Raise if an optimizer holds parameters of before `wrap` or `fully_shard`."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (call := getattr(parameter, _OUTDATED, None)) is not None:
                raise RuntimeError(
                    f"{type(optimizer).__name__} was made before {call}. "
                    "Make the optimizer after it."
                )


def delegates(optimizer: optim.Optimizer, groups: Iterable[FusionWeights]) -> bool:
    """Whether an optimizer steps by others that it holds, as wrappers like Lookahead do.

    Others that hold other parameters step on those, as in a Muon that has an AdamW for the rest.

    Raises:
        RuntimeError: another one holds other parameters on each rank, or some of the same.
    """
    inner = list(_optimizers_in(optimizer))
    if not inner:
        return False
    is_parted = type(optimizer).__name__ == "ZeroRedundancyOptimizer"
    if is_parted and (trained := next((w for w in groups if w.own_tensors()), None)):
        raise RuntimeError(
            f"{type(optimizer).__name__} gives each rank a part of the optimizer, and the fusion "
            f'weights of {trained.group!r} need all of it. Use FSDP2, variant="sw", or '
            'fuse_on="forward".'
        )
    tensors = [t for group in groups for t in (*group.trained(), *group.own_tensors())]
    held = {id(tensor) for tensor in tensors} & held_by(optimizer).keys()
    left = held - set().union(*map(held_by, inner))
    if left and left != held and not is_parted:
        raise RuntimeError(
            f"{type(optimizer).__name__} steps on some weights that are fused from experts itself, "
            f"and on others by {type(inner[0]).__name__}, and its param_groups hold both. Have its "
            'param_groups hold only those that it steps on itself, or wrap with fuse_on="forward".'
        )
    return left != held or is_parted


def _optimizers_in(optimizer: optim.Optimizer) -> Iterator[optim.Optimizer]:
    for value in vars(optimizer).values():
        is_list = isinstance(value, list | tuple)
        for one in value if is_list else value.values() if type(value) is dict else [value]:
            if isinstance(one, optim.Optimizer):
                yield one


def held_by(optimizer: optim.Optimizer) -> dict[int, int]:
    """An optimizer's parameters: by the id of each, the index of its parameter group."""
    return {
        id(parameter): index
        for index, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }


def refuse_within_backward(optimizer: optim.Optimizer, groups: Iterable[FusionWeights]) -> None:
    """Raise if fusion weights need gradients that the running backward has not computed yet."""
    if current_backward() is None:
        return
    if (trained := next((group for group in groups if group.own_tensors()), None)) is not None:
        raise RuntimeError(
            f"{type(optimizer).__name__} steps within a backward, and the fusion weights of "
            f'{trained.group!r} need the gradients of the whole FFN under fuse_on="step". Step '
            'after the backward, or wrap with variant="sw" or fuse_on="forward".'
        )


def refuse_graph(optimizer: optim.Optimizer) -> NoReturn:
    """Raise for a gradient that has a graph."""
    raise RuntimeError(
        f"{type(optimizer).__name__} got gradients with a graph (create_graph=True), which "
        'those of experts under fuse_on="step" cannot have. Wrap with fuse_on="forward".'
    )


def refuse_own_dicts(optimizer: optim.Optimizer, tensors: Iterable[Tensor]) -> None:
    """Raise if an optimizer has values by these tensors, or by their ids, beside its state.

    What it can make again does not count, such as the terms that timm's Kron has by parameter.
    """
    ids = set(map(id, tensors))
    for name, value in vars(optimizer).items():
        if name == "state" or not isinstance(value, dict):
            continue
        keys = [key for key, kept in value.items() if _is_value(kept)]
        if any((id(key) if isinstance(key, Tensor) else key) in ids for key in keys):
            raise RuntimeError(
                f"{type(optimizer).__name__} has a dict by parameter, {name!r}. Under "
                'fuse_on="step" its param_groups hold the experts while it steps, which are '
                "other tensors at each step. Keep these values in self.state[parameter], or wrap "
                'with fuse_on="forward".'
            )


def _is_value(kept: Any) -> bool:
    """Whether it is a tensor or a number, or has one in it."""
    if isinstance(kept, dict | list | tuple):
        return any(map(_is_value, kept.values() if isinstance(kept, dict) else kept))
    return isinstance(kept, Tensor | int | float)


def refuse_dense_state(optimizer: optim.Optimizer, weights: FusionWeights) -> None:
    """Raise if the optimizer remembers the dense tensor that a stack has taken the place of."""
    for stack in weights.expert_stacks():
        values = [v for v in optimizer.state.get(stack, {}).values() if isinstance(v, Tensor)]
        shapes = [value.shape for value in values]
        if stack.ndim == 1 or stack.shape[:-1] in shapes:  # flat under FSDP1; factored (Adafactor)
            continue
        if stack.shape[1:] in shapes:
            raise RuntimeError(
                f"{type(optimizer).__name__} holds state of shape {tuple(stack.shape[1:])} for an "
                f"expert stack of shape {tuple(stack.shape)} in {weights.group!r}: it was made "
                "before wrap(). Make the optimizer after wrap()."
            )
