"""`meo.wrap`: gates and experts into a dense model."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ..finding.discovery import FFNGroup
from ..finding.selection import Filter
from ..wrapping.wrap_linears import wrap_linears
from .attention_watch import AttentionWatch
from .config import MEOConfig
from .gate import Gate
from .model_forwards import ModelForwards, kept_off_fast_paths, refuse_cache
from .surroundings import is_causal, is_in_torch_layer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Model = TypeVar("Model", bound=nn.Module)


def wrap(
    model: Model,
    config: MEOConfig | None = None,
    *,
    filter_fn: Filter | None = None,
    generator: torch.Generator | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    **fields: Any,
) -> Model:
    """Make each FFN linear of a model merge k of N experts before it computes, in place.

    This is Merging Experts into One (He et al., EMNLP 2023, arXiv 2310.09832): a gate chooses
    experts for a sample, and the linear uses their sum `W = sum g_i W_i`, at about the cost of one
    expert.

    The first dimension of an FFN's input must be that of samples (or set `batch_dim`). If a model
    puts the tokens of all samples into one dimension, use `token_mask(model, mask)`, whose shape
    (batch, tokens) determines which tokens belong together; otherwise each token counts as a
    sample.

    Args:
        model: any module. Its code and its other parameters do not change.
        config: the settings; None uses those of the paper.
        filter_fn: as for `exfusion_param.wrap`.
        generator: as for `exfusion_param.wrap`.
        process_group: as for `exfusion_param.wrap`.
        **fields: fields of the config, `meo.wrap(model, level="token")`.

    Returns:
        `model`, the same object.

    Raises:
        TypeError: a field is unknown or has the wrong type.
        ValueError: as for `exfusion_param.wrap`; or a linear is of a class whose forward may do
            more than `nn.Linear`, so it cannot be merged per sample. The model is then unchanged.

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
    asks = config.causal is None and config.level != "task"
    watch = AttentionWatch(asks and not all(gate.is_causal for gate in gates))
    forwards = ModelForwards(gates, watch)
    handles = [
        model.register_forward_pre_hook(forwards.begin),
        model.register_forward_hook(forwards.end, always_call=True),
    ]
    for gate in gates:
        gate.forwards = forwards
        gate.handles.extend(handles)
        if config.level != "task":
            gate.handles.extend(kept_off_fast_paths(gate.linears))
    if any(gate.is_causal for gate in gates):
        gates[0].handles.append(model.register_forward_pre_hook(refuse_cache, with_kwargs=True))
    return model


def _gate_for(model: nn.Module, group: FFNGroup, config: MEOConfig, seed: int) -> Gate:
    if config.level != "task":
        _refuse_more_than_linears(group)
    first = next(iter(group.linears))
    causal = is_causal(model, first) if config.causal is None else config.causal
    gate = Gate(group, config, seed, is_causal=causal and config.level != "task")
    gate.takes_single_samples = is_in_torch_layer(model, first)
    return gate


def _refuse_more_than_linears(group: FFNGroup) -> None:
    """Raise for linears whose forward is not known: it is replaced by a merged product."""
    for fqn, linear in group.linears.items():
        forward: Any = type(linear).forward
        is_known = forward.__module__ in _PLAIN and forward.__qualname__ in _PLAIN_FORWARDS
        strides, padding = getattr(linear, "stride", (1,)), getattr(linear, "padding", (0,))
        if not is_known or set(strides) != {1} or set(padding) != {0}:
            raise ValueError(
                f"{fqn!r} is a {type(linear).__name__}, whose forward may do more than a linear's, "
                "so that it cannot be merged for each sample. Leave it out with filter_fn, or use "
                'level="task".'
            )


_PLAIN = ("torch.nn.modules.linear", "torch.nn.modules.conv", "transformers.pytorch_utils")
_PLAIN_FORWARDS = tuple(
    f"{name}.forward" for name in ("Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D")
)
