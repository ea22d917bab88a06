"""Errors of `fully_shard`, raised before it changes anything."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import distributed, nn

from ..fusion_weights.base import FusionWeights
from ..tensors.shards import is_sharded, local

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def check_shardable(
    model: nn.Module,
    groups: Collection[FusionWeights],
    mesh: DeviceMesh,
    blocks: Sequence[nn.Module],
    settings: Mapping[str, Any],
) -> list[nn.Module]:
    """Raise a ValueError unless the model can be sharded over the mesh, block by block.

    Returns:
        What to shard in turn, each after the blocks within it, and the model last.
    """
    kind = type(model).__name__
    if not groups:
        raise ValueError(
            f"{kind} has no wrapped linear. Call wrap(model) before fully_shard(model), or "
            "torch.distributed.fsdp.fully_shard for a dense model."
        )
    _refuse_sharded(model, groups)
    by_forward = any(not group.fused for group in groups)
    if settings.get("dp_mesh_dims") is None:
        _check_mesh(mesh)
    elif by_forward:
        raise ValueError(
            'dp_mesh_dims needs fuse_on="step". Under "forward" leave it out, and give the '
            'dimensions for data as the mesh: mesh["replicate", "shard"].'
        )
    order = {module: index for index, module in enumerate(model.modules())}
    for block in blocks:
        if block not in order:
            raise ValueError(f"blocks has a {type(block).__name__} that is not in the model.")
    modules = sorted({*blocks, model}, key=order.__getitem__, reverse=True)
    for module in modules:
        if (
            isinstance(module, nn.ModuleList | nn.ModuleDict)
            and type(module).forward is nn.Module.forward
        ):
            raise ValueError(
                f"FSDP2 cannot shard {type(module).__name__}, which has no forward. Give "
                "fully_shard the module that calls its parts, or pass its parts as blocks."
            )
    return modules


def check_placement(name: str, parameter: nn.Parameter, placement: Any, shards: int) -> None:
    """Raise a ValueError unless FSDP2 can shard a parameter over this many ranks."""
    if not parameter.is_contiguous():
        raise ValueError(f"FSDP2 requires contiguous parameters, but {name} is not contiguous.")
    if parameter.ndim == 0:
        raise ValueError(
            f"FSDP2 cannot shard {name}, which has no dimensions. Give it one dimension of size 1."
        )
    dim = getattr(placement, "dim", 0)
    if dim >= parameter.ndim or (dim != 0 and local(parameter).shape[dim] % shards):
        raise ValueError(
            f"{placement} of shard_placement_fn does not fit {name}, of shape "
            f"{tuple(local(parameter).shape)}: beyond dimension 0 FSDP2 needs one that {shards} "
            "ranks divide."
        )


def _refuse_sharded(model: nn.Module, groups: Collection[FusionWeights]) -> None:
    kind = distributed.fsdp.FSDPModule
    sharded = [name for name, module in model.named_modules() if isinstance(module, kind)]
    stacks = {stack for group in groups for stack in group.expert_stacks() if not group.fused}
    spread = [name for name, p in model.named_parameters() if p in stacks and is_sharded(p)]
    if sharded or spread:
        first = [*spread, *filter(None, sharded), "all of it"][0]
        raise ValueError(
            f"{type(model).__name__} is already sharded ({first}). Build it again, wrap it, and "
            "shard it once."
        )


def _check_mesh(mesh: DeviceMesh) -> None:
    if mesh.ndim not in (1, 2):
        raise ValueError(
            f"mesh must have one dimension (shards) or two (replicas, shards), got {mesh.ndim}. "
            'Take the dimensions for data: mesh["dp_replicate", "dp_shard"].'
        )
    if mesh.ndim == 2 and mesh.mesh_dim_names is None:
        raise ValueError(
            "A mesh of two dimensions needs names for FSDP2: "
            'init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard")).'
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"Rank {distributed.get_rank()} is not in the mesh {mesh}.")
