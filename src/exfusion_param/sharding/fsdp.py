"""FSDP2 for wrapped models: torch's own `fully_shard`, block by block.

Under `fuse_on="step"` a wrapped model is a dense one to FSDP2, and torch's `fully_shard` can be
called as well: experts are optimizer state with the rows of their parameter's shard. Each rank
updates its own rows of its own experts, so experts never travel, and the traffic is the dense
model's for any number of experts. What routers and learned fusion weights need of other ranks goes
in one all-reduce at the optimizer's step.

Under `fuse_on="forward"` FSDP2 manages the stacks themselves, sharded beyond the dimension of the
experts, which are fewer than the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ..fusion.lookup import groups_of
from ..fusion_weights.base import live_groups
from ..fusion_weights.memory_bank import MemoryBank
from ..fusion_weights.rank_agreement import require_agreement
from ..step.refusals import outdate
from ..tensors.ranks import ranks_in
from .checks import check_placement, check_shardable
from .transformer_blocks import transformer_blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy
    from torch.distributed.tensor import Shard

PlacementFunction = Callable[[nn.Parameter], Any]
"""A parameter's placement, or None for dimension 0, as FSDP2 asks for it."""

Model = TypeVar("Model", bound=nn.Module)


def fully_shard(
    model: Model,
    *,
    mesh: DeviceMesh,
    blocks: Iterable[nn.Module] | None = None,
    reshard_after_forward: bool | int | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    shard_placement_fn: PlacementFunction | None = None,
    **settings: Any,
) -> Model:
    """Shard a wrapped model over the ranks of a mesh, in place, with FSDP2.

    Call it on all ranks, after `wrap` and activation checkpointing and before the optimizer is
    created. It calls `torch.distributed.fsdp.fully_shard` for each block, and then for the model
    with the remaining parameters. Under `fuse_on="step"` you can make these calls yourself instead.

    Args:
        model: a wrapped model; all ranks must have built the same one.
        mesh: one dimension, or two for HSDP: replicas, and the shards of each. With tensor
            parallelism, the dimensions for data, `mesh["replicate", "shard"]`.
        blocks: modules that are gathered one at a time; None uses the model's Transformer blocks.
        reshard_after_forward: as for FSDP2.
        mp_policy: as for FSDP2. Experts and memory banks keep their dtypes.
        offload_policy: as for FSDP2. Experts are on the device of their weight.
        shard_placement_fn: as for FSDP2. Under "forward" it must return None for expert stacks,
            because their placement is chosen here.
        **settings: further arguments of torch's function.

    Returns:
        `model`, the same object.

    Raises:
        ValueError: nothing is wrapped, something is already sharded, the mesh, the blocks or a
            placement do not fit the model, or under "forward" the ranks wrapped the model
            differently. The model is then unchanged.

    Examples:
        >>> torch.distributed.init_process_group(None, "tcp://localhost:0", rank=0, world_size=1)
        >>> mesh = torch.distributed.init_device_mesh("cpu", (1,))  # of one process, for once
        >>> model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = exf.fully_shard(exf.wrap(model, fuse_on="step"), mesh=mesh)
        >>> model.linear1.weight.placements
        (Shard(dim=0),)
        >>> torch.distributed.destroy_process_group()
    """
    from torch.distributed import fsdp

    groups = groups_of(model)
    chosen = transformer_blocks(model) if blocks is None else list(blocks)
    modules = check_shardable(model, groups, mesh, chosen, settings)
    placement = _placements(model, mesh, shard_placement_fn)
    by_forward = {group: name for group, name in groups.items() if not group.fused}
    if by_forward:
        ranks = ranks_in(mesh)
        require_agreement(by_forward, ranks)
    outdate(model.parameters(), "fully_shard()")
    policies = {"mp_policy": mp_policy, "offload_policy": offload_policy}
    settings |= {key: value for key, value in policies.items() if value is not None}
    for module in modules:
        fsdp.fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            shard_placement_fn=placement,
            **settings,
        )
    for group in by_forward:
        group.given_ranks = ranks
    for group in groups:
        if isinstance(group, MemoryBank):
            group.votes.follow_anchor()
    return model


def expert_placement(parameter: nn.Parameter) -> Shard | None:
    """Choose how FSDP2's own `fully_shard` shards expert stacks, under `fuse_on="forward"`.

        torch.distributed.fsdp.fully_shard(block, shard_placement_fn=exf.expert_placement)

    Expert stacks are sharded along the first dimension after that of the experts whose size is
    divisible by the number of ranks, which FSDP2 requires. Other parameters, and stacks without
    such a dimension, are sharded along dimension 0.

    Examples:
        >>> torch.distributed.init_process_group(None, "tcp://localhost:0", rank=0, world_size=1)
        >>> model = exf.wrap(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
        >>> exf.expert_placement(model.linear1.parametrizations.weight.original)
        Shard(dim=1)
        >>> exf.expert_placement(model.norm1.weight)  # None: dimension 0
        >>> torch.distributed.destroy_process_group()
    """
    every = (stack for group in live_groups() for stack in group.expert_stacks())
    if not any(parameter is stack for stack in every):
        return None
    return _even(parameter, torch.distributed.get_world_size())


def _placements(
    model: nn.Module, mesh: DeviceMesh, by_user: PlacementFunction | None
) -> PlacementFunction:
    """Decide how each parameter of a model is sharded, before any of them is."""
    from torch.distributed.tensor import Shard

    chosen: dict[nn.Parameter, Any] = {}
    stacks = {stack for group in groups_of(model) for stack in group.expert_stacks()}
    for name, parameter in model.named_parameters():
        is_stack = parameter in stacks
        chosen[parameter] = own = _even(parameter, mesh.size(-1)) if is_stack else None
        wanted = None if by_user is None else by_user(parameter)
        if wanted is not None and is_stack and wanted != (own or Shard(0)):
            raise ValueError(
                f"shard_placement_fn gives {wanted!r} for {name!r}, an expert stack of shape "
                f"{tuple(parameter.shape)}, which is sharded by {own or Shard(0)!r}. Return None "
                "for stacks, which have a dimension more than their weight, or wrap with "
                'fuse_on="step".'
            )
        if wanted is not None:
            chosen[parameter] = wanted
        check_placement(name, parameter, chosen[parameter], mesh.size(-1))
    return chosen.get


def _even(stack: nn.Parameter, shards: int) -> Shard | None:
    """The first dimension behind the experts' that the ranks divide."""
    from torch.distributed.tensor import Shard

    even = (dim for dim in range(1, stack.ndim) if stack.shape[dim] % shards == 0)
    dim = next(even, None)
    return None if dim is None else Shard(dim)
