"""Models at the task level: set the task, and fuse to the dense model of one."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import api, state_dict
from .balance import gates_of
from .gate import Gate

Model = TypeVar("Model", bound=nn.Module)
Task = int | Tensor


def set_task(model: nn.Module, task: Task) -> None:
    """Set the task whose gates the model uses from now on.

    The task belongs to the model, not to the calling thread: to serve several tasks at the same
    time, use a copy of the model for each, or the dense models of `meo.fuse`.

    Args:
        model: wrapped with `level="task"`.
        task: a number below `task_dim`, or an embedding of the task, shape (task_dim,).

    Raises:
        ValueError: the model is not wrapped with `level="task"`, or the task does not fit.

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
    """Turn a wrapped model into the dense model of one task, in place; see `exfusion_param.fuse`.

    Args:
        model: wrapped with `level="task"`. Fuse a `copy.deepcopy(model)` for each task.
        task: as for `set_task`; None uses the task that is set.

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
    with _of_task(model, task):
        return api.fuse(model)


def fused_state_dict(model: nn.Module, *, task: Task | None = None) -> OrderedDict[str, Any]:
    """Return the state dict that `meo.fuse(model, task=task)` would produce; changes nothing.

    Args:
        model: wrapped with `level="task"`.
        task: as for `set_task`; None uses the task that is set.

    Raises:
        ValueError: the model is not wrapped so, or the task does not fit, or is not set.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        >>> model = meo.wrap(model, level="task", task_dim=3)
        >>> by_task = [meo.fused_state_dict(model, task=task) for task in range(3)]
        >>> list(by_task[0])
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    with _of_task(model, task):
        return state_dict.fused_state_dict(model)


@contextlib.contextmanager
def _of_task(model: nn.Module, task: Task | None) -> Iterator[None]:
    """Within it the model has another task; None leaves the one that is set."""
    gates = gates_of(model)
    before = [gate.task for gate in gates]
    if task is not None:
        set_task(model, task)
    try:
        yield
    finally:
        for gate, previous in zip(gates, before, strict=True):
            gate.task = previous


def _embedding(gate: Gate, task: Task) -> Tensor:
    """A task as the gate takes it, shape (task_dim,)."""
    size = gate.config.task_dim
    if size is None:
        raise ValueError(
            f'The model is wrapped with level="{gate.config.level}", which has no tasks. '
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
