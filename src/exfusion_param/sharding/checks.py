"""What `fully_shard` refuses, before it changes anything."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from torch import distributed, nn

from ..fusion_weights.base import FusionWeights
from ..tensors.shards import is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def check_shardable(
    model: nn.Module,
    groups: Collection[FusionWeights],
    mesh: DeviceMesh,
    blocks: Sequence[nn.Module],
) -> None:
    """Raise a ValueError unless the model can be sharded over the mesh, block by block."""
    if not groups:
        raise ValueError(
            f"{type(model).__name__} has no wrapped linear. Call wrap(model) before "
            "fully_shard(model), or torch.distributed.fsdp.fully_shard for a dense model."
        )
    sharded = [name for name, parameter in model.named_parameters() if is_sharded(parameter)]
    if sharded or isinstance(model, distributed.fsdp.FSDPModule):
        raise ValueError(
            f"{type(model).__name__} is sharded already{_first_of(sharded)}. Build it again, wrap "
            "it, and shard it once."
        )
    _check_mesh(mesh)
    inside = set(model.modules())
    for block in blocks:
        if block not in inside:
            raise ValueError(f"blocks has a {type(block).__name__} that is not in the model.")
    odd = [name for name, parameter in model.named_parameters() if not parameter.is_contiguous()]
    if odd:
        raise ValueError(f"FSDP2 takes only contiguous parameters, and {odd[0]} is not.")


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


def _first_of(names: Sequence[str]) -> str:
    return f" ({names[0]} is a DTensor)" if names else ""
