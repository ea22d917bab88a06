"""`wrap` and `fuse`: a dense model to expert stacks, in place, and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from .config import ExFusionConfig
from .expert_config import ENTRY
from .finding.selection import Filter
from .fusion.lookup import groups_of, wrapped_linears
from .fusion_weights.base import FusionWeights
from .fusion_weights.empty_banks import share_alarm, warn_of_empty_banks
from .fusion_weights.fused import Fused
from .fusion_weights.variants import fusion_weights_for
from .step.attach import detach_fused
from .step.expert_step import refuse_half_done
from .wrapping.attach import detach
from .wrapping.checks import check_fusable
from .wrapping.wrap_linears import wrap_linears

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Model = TypeVar("Model", bound=nn.Module)


def wrap(
    model: Model,
    config: ExFusionConfig | None = None,
    *,
    filter_fn: Filter | None = None,
    generator: torch.Generator | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    **fields: Any,
) -> Model:
    """Turn the FFN linears of a model into weighted sums of experts, in place.

    Create the optimizer after this call, from `param_groups(model, weight_decay)` or
    `model.parameters()`.

    Args:
        model: any module. Its code and its other parameters do not change.
        config: the settings; None uses those of the paper.
        filter_fn: selects the linears to wrap, instead of the FFNs that are found automatically:
            a function `filter_fn(module, fqn) -> bool` that is called for every linear, or globs
            for their names. A tuple of globs names the linears of one FFN, which share fusion
            weights, in the order in which they run: `[("blocks.*.up.conv", "blocks.*.down.conv")]`.
        generator: draws the seed of the experts and routers, instead of `config.seed`.
        process_group: the ranks that train this model, as a process group or a device mesh. Needed
            only if they are not all ranks of the job, as for a pipeline stage or one of several
            models. Routers and learned fusion weights are reduced over these ranks. FSDP2 and
            DistributedDataParallel provide the group automatically, except under `torch.compile`
            and before the first forward.
        **fields: fields of the config, as in `wrap(model, num_experts=8, variant="dw")`.

    Returns:
        `model`, the same object.

    Raises:
        TypeError: a field is unknown or has the wrong type.
        ValueError: a field is out of range, nothing matched, or a linear cannot be wrapped (tied,
            frozen, sharded, already wrapped, not floating point). The model is then unchanged.

    Examples:
        >>> model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = exf.wrap(model, num_experts=4, variant="dw")
        >>> model.linear1.weight.shape  # the fused weight
        torch.Size([16, 8])
        >>> model.linear1.parametrizations.weight.original.shape  # the experts
        torch.Size([4, 16, 8])
    """
    config = ExFusionConfig.resolve(config, fields)
    share_alarm(
        wrap_linears(
            model,
            config,
            fusion_weights_for,
            filter_fn=filter_fn,
            generator=generator,
            process_group=process_group,
        )
    )
    fills_first = config.variant == "mb" and config.bank_init == "zeros"
    if fills_first and config.expert_init != "independent":
        warnings.warn(
            "Upcycled experts under a memory bank of zeros: the model loses its pretraining "
            'while the bank fills. Use bank_init="uniform".',
            stacklevel=2,
        )
    return model


def fuse(model: Model) -> Model:
    """Turn a wrapped model back into the dense one, in place, with the fused weights.

    Classes, parameter names, their order and dtypes are the same as before `wrap`, and no hooks or
    buffers remain. To ship a model and continue training it, use `fused_state_dict`, or fuse a
    `copy.deepcopy(model)`.

    Args:
        model: a wrapped model, or a submodule that contains complete FFN groups.

    Returns:
        `model`, the same object.

    Raises:
        ValueError: nothing is wrapped, a linear is sharded, or experts hold NaN or inf. The model
            is then unchanged.
        RuntimeError: the last optimizer step failed when only some experts had been updated.

    Examples:
        >>> model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = exf.fuse(exf.wrap(model, variant="sw"))
        >>> model.linear1
        Linear(in_features=8, out_features=16, bias=True)
    """
    linears = wrapped_linears(model)
    groups = groups_of(model)
    for group in groups:
        group.end_forward()
    check_fusable(model, linears, groups)
    refuse_half_done(groups)
    warn_of_empty_banks(groups)
    _warn_of_experts_that_never_moved(groups)
    for linear in linears.values():
        detach(linear)
    for group in groups:
        detach_fused(model, group)
        group.remove_hooks()
    config = getattr(model, "config", None)
    if isinstance(getattr(config, ENTRY, None), dict):  # read back from a config.json
        delattr(config, ENTRY)
    return model


def _warn_of_experts_that_never_moved(groups: Iterable[FusionWeights]) -> None:
    """Warn if weights under `fuse_on="step"` were trained by something else than an optimizer."""
    still = [
        group.group
        for group in groups
        if not group.was_loaded and any(_is_trained_without_experts(f) for f in group.fused)
    ]
    if still:
        warnings.warn(
            f"The weights of {len(still)} FFN groups ({still[0]!r} first) changed since wrap() "
            'without a step of a torch.optim.Optimizer on them. Under fuse_on="step" their experts '
            'need one to move; otherwise wrap with fuse_on="forward".',
            stacklevel=3,
        )


def _is_trained_without_experts(fused: Fused) -> bool:
    # An average of the weights has no gradients, and is shipped without a step of its own.
    is_trained = fused.parameter.grad is not None or fused.fusion_weights.is_in_custom_loop
    return is_trained and not fused.has_stepped() and not fused.is_untouched()
