"""FSDP2 for wrapped models: expert stacks sharded like the weights that they are fused into.

Note [What travels]
Under `fuse_on="step"` FSDP2 manages the fused leaf as it would a dense weight: it is gathered,
prefetched, cast, and its gradient reduced and scattered. The stacks are DTensors with the rows of
the leaf's shard, and FSDP2 ignores them. Each rank pulls the gradient of its own rows back to its
own experts, and fuses its own rows: experts never travel, and the traffic is the dense model's for
any number of experts. Routers and learned fusion weights are replicated; what they need of the
other ranks goes in one all-reduce at the optimizer's step (pull_back.py).

Under `fuse_on="forward"` FSDP2 manages the stacks themselves, sharded beyond the dimension of the
experts, of which there are fewer than ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from .agreement import require_agreement
from .fused_leaf import leaves_of
from .fusion_weights import FusionWeights
from .memory_bank import MemoryBank
from .parametrization import groups_of
from .ranks import Ranks
from .sharding_checks import check_shardable
from .shared_displacement import SharedDisplacement
from .step_hooks import outdate, watched
from .transformer_blocks import transformer_blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy
    from torch.distributed.tensor import Shard

Model = TypeVar("Model", bound=nn.Module)


def fully_shard(
    model: Model,
    *,
    mesh: DeviceMesh,
    blocks: Iterable[nn.Module] | None = None,
    reshard_after_forward: bool | int | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
) -> Model:
    """Shard a wrapped model over the ranks of a mesh, in place, with FSDP2.

    All ranks call it, after `wrap` and activation checkpointing, before the optimizer is made. Each
    block is sharded by `torch.distributed.fsdp.fully_shard`, then the model with what is left.

    Args:
        model: a wrapped model, alike on all ranks.
        mesh: of one dimension, or of two for HSDP: replicas, and shards within each.
        blocks: modules to gather one at a time; None takes the model's Transformer blocks.
        reshard_after_forward: as for FSDP2.
        mp_policy: as for FSDP2. Stacks, gradients of experts, routers and memory banks keep their
            dtypes.
        offload_policy: as for FSDP2. The stacks go with the weights.

    Returns:
        `model`, the same object.

    Raises:
        ValueError: nothing is wrapped, something is sharded already, the mesh or the blocks do not
            fit the model, or the ranks wrapped differently. The model is then unchanged.
    """
    from torch.distributed import fsdp

    groups = groups_of(model)
    chosen = transformer_blocks(model) if blocks is None else list(blocks)
    check_shardable(model, groups, mesh, chosen)
    ranks = ranks_of(mesh)
    require_agreement(groups, ranks)
    outdate(model.parameters())
    by_step = [weights for weights in groups if weights.config.fuse_on == "step"]
    policies = {"mp_policy": mp_policy, "offload_policy": offload_policy}
    settings: dict[str, Any] = {key: value for key, value in policies.items() if value is not None}
    ignored = {parameter for weights in by_step for parameter in weights.moved_at_step()}
    modules: list[nn.Module] = [*chosen, model]
    for module in dict.fromkeys(modules):
        fsdp.fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            shard_placement_fn=lambda parameter: _placement(parameter, mesh.size(-1)),
            ignored_params=ignored,
            **settings,
        )
    for weights in groups:
        weights.sharing = ranks
    offloads = isinstance(offload_policy, fsdp.CPUOffloadPolicy)
    for weights in by_step:
        _shard_stacks(weights, mesh, offloads)
    for weights in groups:
        if isinstance(weights, MemoryBank):
            weights.pending.follow_anchor()
    if by_step:
        model.register_forward_pre_hook(_refresh_leaves, prepend=True)  # before FSDP2's gathers
    return model


def expert_placement(parameter: nn.Parameter) -> Shard | None:
    """A `shard_placement_fn` for FSDP2 itself, under `fuse_on="forward"`.

        torch.distributed.fsdp.fully_shard(block, shard_placement_fn=exf.expert_placement)

    Expert stacks are sharded along the first dimension behind the experts' that the ranks of the
    job divide, as FSDP2 asks for; everything else, and stacks without one, along dimension 0.
    """
    return _placement(parameter, torch.distributed.get_world_size())


def ranks_of(mesh: DeviceMesh) -> Ranks:
    """The ranks of a mesh of shards, or of replicas and shards."""
    groups = tuple(mesh.get_group(dim) for dim in range(mesh.ndim))
    return Ranks(groups, replicas=mesh.size() // mesh.size(-1))


def _placement(parameter: nn.Parameter, shards: int) -> Shard | None:
    from torch.distributed.tensor import Shard

    if not _is_stack(parameter):
        return None
    even = (dim for dim in range(1, parameter.ndim) if parameter.shape[dim] % shards == 0)
    dim = next(even, None)
    return None if dim is None else Shard(dim)


def _is_stack(parameter: nn.Parameter) -> bool:
    return any(parameter is stack for weights in watched() for stack in weights.expert_stacks())


def _shard_stacks(weights: FusionWeights, mesh: DeviceMesh, offloads: bool) -> None:
    """Shard the stacks like their leaves, replicate the fusion weights, and fuse."""
    from torch.distributed.tensor import Replicate

    replicated = [Replicate()] * mesh.ndim
    for name, parameter in list(weights.named_parameters(recurse=False)):
        setattr(weights, name, _distributed(parameter, parameter.detach(), mesh, replicated))
    for holder, fusion in weights.fusions:
        holder.original = _rows(holder.original, 1, mesh, offloads)
        if isinstance(fusion, SharedDisplacement):
            fusion.displacement = _rows(fusion.displacement, 0, mesh, offloads)
    weights.settle()


def _rows(parameter: nn.Parameter, dim: int, mesh: DeviceMesh, offloads: bool) -> nn.Parameter:
    """A parameter of whose dimension `dim` each rank has the rows that FSDP2 would give it."""
    from torch.distributed.tensor import Replicate, Shard

    index, count = mesh.get_local_rank(mesh.ndim - 1), mesh.size(-1)
    whole = parameter.detach()
    chunks = [*whole.chunk(count, dim=dim)]
    chunks += [whole.narrow(dim, 0, 0)] * (count - len(chunks))
    rows = chunks[index].clone()  # and not a view, which would keep all rows
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(dim)]
    return _distributed(parameter, rows, mesh, placements, offloads)


def _distributed(
    parameter: nn.Parameter,
    part: Tensor,
    mesh: DeviceMesh,
    placements: list[Any],
    offloads: bool = False,
) -> nn.Parameter:
    from torch.distributed.tensor import DTensor

    if not part.is_meta:
        part = part.to(mesh.device_type)
    tensor = DTensor.from_local(
        part,
        mesh,
        placements,
        run_check=False,
        shape=parameter.shape,
        stride=torch.empty(parameter.shape, device="meta").stride(),
    )
    moves = offloads and not part.is_meta
    return nn.Parameter(tensor.to("cpu") if moves else tensor, parameter.requires_grad)


def _refresh_leaves(model: nn.Module, args: Any) -> None:
    """Fuse the leaves anew whose experts have been changed, as by a checkpoint."""
    if torch.compiler.is_compiling():
        return
    for weights in groups_of(model):
        for stack, leaf in leaves_of(weights):
            leaf.refresh(stack)
