"""Parameter and memory counts of a wrapped model, or of a dry run, in training and after `fuse`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .api import wrap
from .config import ExFusionConfig
from .expert_config import ExpertConfig
from .finding.left_out import left_out
from .finding.selection import Filter
from .fusion.lookup import dense_shape, fused_names, fusion_weights_of, labels_of, wrapped_linears
from .fusion_weights.base import FusionWeights

ADAMW_TENSORS = 4  # weight, gradient and two moments for each trained parameter


@dataclasses.dataclass(frozen=True)
class LinearSummary:
    """One linear: its name, its FFN group, its experts, and its dense shapes by tensor name."""

    name: str
    group: str
    num_experts: int
    shapes: Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Summary:
    """The result of `summarize`; `print` it for a table.

    Args:
        configs: the settings; more than one if parts of the model were wrapped differently.
        linears: the wrapped linears, group by group.
        fusion_parameters: number of parameters in routers or learned fusion weights.
        training_parameters: number of parameters of the wrapped model.
        shipped_parameters: number of parameters after `fuse`.
        training_bytes: size of all weights, and of the gradients and AdamW's two moments of the
            trained ones, in the weights' dtypes.
        shipped_bytes: size of the weights after `fuse`.
        left_dense: one line for each kind of linear that looks like a part of an FFN and is not
            wrapped.

    Examples:
        >>> model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> summary = exf.summarize(model, num_experts=4)
        >>> summary.num_groups, len(summary.linears)
        (1, 2)
        >>> summary.training_parameters, summary.shipped_parameters
        (1472, 600)
    """

    configs: tuple[ExpertConfig, ...]
    linears: tuple[LinearSummary, ...]
    fusion_parameters: int
    training_parameters: int
    shipped_parameters: int
    training_bytes: int
    shipped_bytes: int
    left_dense: tuple[str, ...] = ()

    @property
    def num_groups(self) -> int:
        """How many FFN groups are wrapped."""
        return len({linear.group for linear in self.linears})

    def __str__(self) -> str:
        methods = " and ".join(
            f"{config.label}, {config.num_experts} experts" for config in self.configs
        )
        rows = [("FFN group", "linear", "weight", "experts")]
        for linear in self.linears:
            shape = " x ".join(map(str, linear.shapes["weight"]))
            rows.append((linear.group, linear.name, shape, f"{linear.num_experts} x {shape}"))
        return "\n".join(
            [
                f"{methods}: {len(self.linears)} linears in {self.num_groups} FFN groups",
                *_aligned(rows),
                *[f"left dense: {line}" for line in self.left_dense],
                f"router or fusion weights: {self.fusion_parameters:,} parameters",
                f"in training: {self.training_parameters:,} parameters, "
                f"{_size(self.training_bytes)} with gradients and AdamW's moments",
                f"shipped: {self.shipped_parameters:,} parameters, {_size(self.shipped_bytes)}",
            ]
        )


def summarize(
    model: nn.Module,
    config: ExFusionConfig | None = None,
    *,
    filter_fn: Filter | None = None,
    **fields: Any,
) -> Summary:
    """List what is wrapped in a model, or what `wrap` would wrap in a dense one, with sizes.

    Args:
        model: a wrapped model, or a dense one for a dry run, which neither changes nor copies it.
        config: for a dry run, as for `wrap`.
        filter_fn: for a dry run, as for `wrap`.
        **fields: for a dry run, as for `wrap`.

    Returns:
        A `Summary`; print it for a table.

    Raises:
        TypeError: as for `wrap`.
        ValueError: as for `wrap`, or settings are given for a model that is already wrapped.

    Examples:
        >>> model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
        >>> print(exf.summarize(model, num_experts=4, variant="mb"))
        ExFusion mb, 4 experts: 2 linears in 1 FFN groups
        FFN group  linear     weight  experts
        0          0.linear1  16 x 8  4 x 16 x 8
        0          0.linear2  8 x 16  4 x 8 x 16
        router or fusion weights: 32 parameters
        in training: ...
        shipped: 600 parameters, ...
    """
    if wrapped_linears(model):
        if config is not None or filter_fn is not None or fields:
            raise ValueError("The model is wrapped already. Call summarize(model) by itself.")
        return _summary(model)
    config = ExFusionConfig.resolve(config, fields)
    with torch.random.fork_rng(devices=[]):  # a dry run leaves the draws to wrap
        return _summary(wrap(_meta_copy(model), config, filter_fn=filter_fn))


def _meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters have shapes and no memory."""
    memo: dict[int, Any] = {}
    # Attributes that are tensors are weights that pruning and older norms have computed.
    attributes = [value for module in model.modules() for value in vars(module).values()]
    computed = [value for value in attributes if isinstance(value, Tensor)]
    for tensor in (*model.parameters(), *model.buffers(), *computed):
        if nn.parameter.is_lazy(tensor):
            continue
        meta = tensor.detach().to("meta")
        if isinstance(tensor, nn.Parameter):
            meta = nn.Parameter(meta, tensor.requires_grad)
        memo[id(tensor)] = meta
    return copy.deepcopy(model, memo)


def _summary(model: nn.Module) -> Summary:
    groups = labels_of(model)
    linears = []
    wrapped = wrapped_linears(model)
    left = left_out(model, wrapped.values())
    for fqn, linear in wrapped.items():
        group = fusion_weights_of(linear)
        shapes = {name: tuple(dense_shape(linear, name)) for name in fused_names(linear)}
        linears.append(LinearSummary(fqn, groups[group], group.config.num_experts, shapes))
    fusion = [parameter for group in groups for parameter in group.parameters()]
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    experts = [tensor for group in groups for tensor in _experts_in_optimizers(group)]
    surplus: list[Tensor] = []
    for group in groups:  # all but one expert
        if group.config.ships_dense:
            surplus += group.parameters()
            surplus += [stack[1:] for stack in group.expert_stacks()]
    fused = [fused.parameter for group in groups for fused in group.fused]
    return Summary(
        tuple(dict.fromkeys(group.config for group in groups)),
        tuple(linears),
        fusion_parameters=_count(fusion),
        training_parameters=_count(parameters) - _count(fused) + _count(experts),
        shipped_parameters=_count(parameters) - _count(surplus),
        training_bytes=_bytes(parameters)
        + (ADAMW_TENSORS - 1) * _bytes(trained)
        - 2 * _bytes(fused)  # which have a gradient, and no moments
        + 3 * _bytes(experts),  # which have moments, and no gradient
        shipped_bytes=_bytes(parameters) - _bytes(surplus),
        left_dense=tuple(f"{k.ffns} x {k.widths}, {k.linears}" for k in left),
    )


def _experts_in_optimizers(group: FusionWeights) -> Iterator[Tensor]:
    """Tensors like the experts that an optimizer holds, without memory."""
    for fused in group.fused:
        parameter = fused.parameter
        shape = (group.config.num_experts, *parameter.shape)
        yield torch.empty(shape, dtype=parameter.dtype, device="meta")


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
