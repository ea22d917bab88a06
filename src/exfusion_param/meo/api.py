"""`meo.wrap`, and what a model at the task level can do besides."""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from .. import api, state_dict
from ..finding.discovery import FFNGroup
from ..finding.projections import projection_of
from ..finding.selection import Filter
from ..tensors.expert_starts import named_generator
from ..tensors.precision import accumulation_dtype
from ..wrapping.wrap_linears import wrap_linears
from .balance import gates_of
from .config import MEOConfig
from .course import Course
from .gate import Gate
from .hooks import kept_off_fast_paths, refuse_cache
from .surroundings import batch_dim, is_causal

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Model = TypeVar("Model", bound=nn.Module)
Task = int | Tensor


def wrap(
    model: Model,
    config: MEOConfig | None = None,
    *,
    filter_fn: Filter | None = None,
    generator: torch.Generator | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    **fields: Any,
) -> Model:
    """Let each FFN linear of a model merge k of N experts before it computes, in place.

    Merging Experts into One (He et al., EMNLP 2023, arXiv 2310.09832): `W = sum g_i W_i` over the
    experts that a gate has chosen for a sample, at about the cost of one of them.

    The first dimension of an FFN's input runs over samples (`batch_dim` for another one). A model
    that puts the tokens of all samples into one dimension needs `token_mask(model, mask)`, whose
    mask of shape (batch, tokens) says which tokens belong together; without it each token is a
    sample of its own.

    Args:
        model: any module. Its classes, code and other parameters stay as they are.
        config: the settings; None takes the paper's.
        filter_fn: as for `exfusion_param.wrap`.
        generator: as for `exfusion_param.wrap`.
        process_group: as for `exfusion_param.wrap`.
        **fields: fields of the config, `meo.wrap(model, level="token")`.

    Returns:
        `model`, the same object.

    Raises:
        TypeError: a field is unknown or has the wrong type.
        ValueError: as for `exfusion_param.wrap`; or a linear does more than a linear does, so that
            it cannot be merged for each sample. The model is then unchanged.

    Examples:
        >>> model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = meo.wrap(model, num_experts=4, top_k=2)
        >>> model(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """
    config = MEOConfig.resolve(config, fields)
    make_gate = functools.partial(_gate_for, model)
    new = wrap_linears(
        model,
        config,
        make_gate,
        filter_fn=filter_fn,
        generator=generator,
        process_group=process_group,
    )
    gates = [weights for weights in new if isinstance(weights, Gate)]
    course = Course(gates)
    handles = [
        model.register_forward_pre_hook(course.begin),
        model.register_forward_hook(course.end, always_call=True),
    ]
    for gate in gates:
        gate.course = course
        gate.handles.extend(handles)
        if config.level != "task":
            gate.handles.extend(kept_off_fast_paths(gate.linears))
    if any(gate.is_causal for gate in gates):
        gates[0].handles.append(model.register_forward_pre_hook(refuse_cache, with_kwargs=True))
    return model


def set_task(model: nn.Module, task: Task) -> None:
    """Name the task whose gates the model is to use from now on.

    The task is the model's, whichever thread calls it: threads that serve several tasks at a time
    need a copy of the model for each, or the dense models of `meo.fuse`.

    Args:
        model: wrapped with `level="task"`.
        task: a number below `task_dim`, or an embedding of the task, shape (task_dim,).

    Raises:
        ValueError: the model is not wrapped so, or the task does not fit.

    Examples:
        >>> model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = meo.wrap(model, level="task", task_dim=3)
        >>> meo.set_task(model, 1)
        >>> meo.set_task(model, torch.tensor([0.2, 0.0, 0.8]))  # an embedding of a task
        >>> model(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """
    gates = gates_of(model)
    embeddings = [_embedding(gate, task) for gate in gates]
    for gate, embedding in zip(gates, embeddings, strict=True):
        gate.task = embedding


def fuse(model: Model, *, task: Task | None = None) -> Model:
    """Give the dense model of one task back, in place; see `exfusion_param.fuse`.

    Args:
        model: wrapped with `level="task"`. Fuse a `copy.deepcopy(model)` for each task.
        task: as for `set_task`; None takes the one that is set.

    Returns:
        `model`, the same object.

    Raises:
        ValueError: as for `exfusion_param.fuse`, or the task does not fit, or is not set. The model
            is then unchanged.

    Examples:
        >>> model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = meo.wrap(model, level="task", task_dim=3)
        >>> model = meo.fuse(model, task=1)
        >>> model.linear1
        Linear(in_features=8, out_features=16, bias=True)
    """
    before = [gate.task for gate in gates_of(model)]
    if task is not None:
        set_task(model, task)
    try:
        return api.fuse(model)
    except ValueError:
        for gate, previous in zip(gates_of(model), before, strict=True):
            gate.task = previous
        raise


def fused_state_dict(model: nn.Module, *, task: Task | None = None) -> OrderedDict[str, Any]:
    """The state dict that `meo.fuse(model, task=task)` would have; the model is left as it is.

    Args:
        model: wrapped with `level="task"`.
        task: as for `set_task`; None takes the one that is set.

    Raises:
        ValueError: the model is not wrapped so, or the task does not fit, or is not set.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        >>> model = meo.wrap(model, level="task", task_dim=3)
        >>> by_task = [meo.fused_state_dict(model, task=task) for task in range(3)]
        >>> list(by_task[0])
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    gates = gates_of(model)
    before = [gate.task for gate in gates]
    if task is not None:
        set_task(model, task)
    try:
        return state_dict.fused_state_dict(model)
    finally:
        for gate, previous in zip(gates, before, strict=True):
            gate.task = previous


def _gate_for(model: nn.Module, group: FFNGroup, config: MEOConfig, seed: int) -> Gate:
    if config.level != "task":
        _refuse_more_than_linears(group)
    linears = tuple(group.linears.values())
    projections = [projection_of(linear) for linear in linears]
    weight, first = linears[0].get_parameter("weight"), next(iter(group.linears))
    causal = is_causal(model, first) if config.causal is None else config.causal
    samples = batch_dim(model, first) if config.batch_dim is None else config.batch_dim
    return Gate(
        group.name,
        first.removeprefix(group.name).lstrip("."),
        config,
        linears,
        in_features=tuple(p.in_features for p in projections if p is not None),
        is_causal=causal and config.level != "task",
        batch_dim=samples,
        device=weight.device,
        dtype=accumulation_dtype(weight.dtype),
        generator=named_generator(seed, f"{group.name}.gate", weight.device),
    )


def _refuse_more_than_linears(group: FFNGroup) -> None:
    """Raise for linears whose forward is not known: it is replaced by a merged product."""
    for fqn, linear in group.linears.items():
        forward: Any = type(linear).forward
        is_known = forward.__module__ in _PLAIN and forward.__qualname__ in _PLAIN_FORWARDS
        strides = getattr(linear, "stride", 1), getattr(linear, "padding", 0)
        if not is_known or set(_flat(strides[0])) != {1} or set(_flat(strides[1])) != {0}:
            raise ValueError(
                f"{fqn!r} is a {type(linear).__name__}, whose forward may do more than a linear's, "
                "so that it cannot be merged for each sample. Leave it out with filter_fn, or use "
                'level="task".'
            )


_PLAIN = ("torch.nn.modules.linear", "torch.nn.modules.conv", "transformers.pytorch_utils")
_PLAIN_FORWARDS = tuple(
    f"{name}.forward" for name in ("Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D")
)


def _flat(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _embedding(gate: Gate, task: Task) -> Tensor:
    """A task as the gate takes it, shape (task_dim,)."""
    size = gate.config.task_dim
    if size is None:
        raise ValueError(
            f'The model is wrapped with level="{gate.config.level}", which knows no tasks. '
            'Wrap it with level="task".'
        )
    if isinstance(task, Tensor):
        if task.shape != (size,) or not task.is_floating_point():
            raise ValueError(
                f"task must have shape ({size},) and a floating dtype, got {tuple(task.shape)} "
                f"and {task.dtype}."
            )
        return task.detach().to(gate.gate.device, gate.gate.dtype)
    if isinstance(task, bool) or not isinstance(task, int) or not 0 <= task < size:
        raise ValueError(f"task must be an int from 0 to {size - 1} or an embedding, got {task!r}.")
    one_hot = torch.zeros(size, device=gate.gate.device, dtype=gate.gate.dtype)
    one_hot[task] = 1
    return one_hot
