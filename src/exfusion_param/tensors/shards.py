"""The same operations on plain tensors and on DTensors, whose parts are spread over the ranks.

`torch.distributed.tensor` takes long to import, and who has a DTensor has imported it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from .ranks import ALONE, Ranks, ranks_of_groups

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor."""
    if type(tensor) is nn.Parameter or type(tensor) is Tensor:  # asked often
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part that this rank holds, without a gradient and in the same memory."""
    kind = type(tensor)  # asked often
    if kind is nn.Parameter or kind is Tensor or not is_sharded(tensor):
        return tensor.detach()
    with torch.no_grad():  # else a view comes, whose version says nothing of the tensor's
        return tensor.to_local()


def plus(tensor: Tensor, number: Tensor) -> Tensor:
    """A tensor plus a number of this rank, whose gradient is plain whatever the tensor is."""
    if not is_sharded(tensor):
        return tensor + number
    return with_memory_of(tensor.to_local() + number, tensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all ranks; they have to call this together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def with_memory_of(part: Tensor, like: Tensor) -> Tensor:
    """A tensor spread over the ranks as `like` is, in the memory of this rank's `part`."""
    return _from_local(part, like, like.shape, like.stride()) if is_sharded(like) else part


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every rank has, spread over the ranks as `like` is."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    return sys.modules["torch.distributed.tensor"].distribute_tensor(
        tensor.to(local(like).device), like.device_mesh, like.placements, src_data_rank=None
    )


def replicated(tensor: Tensor, like: DTensor) -> Tensor:
    """A whole tensor, which every rank has, on the mesh of the DTensor `like`."""
    if is_sharded(tensor):
        return tensor
    module = sys.modules["torch.distributed.tensor"]
    places = [module.Replicate()] * like.device_mesh.ndim
    return module.DTensor.from_local(tensor, like.device_mesh, places, run_check=False)


def has_nonzero(tensor: Tensor) -> Tensor:
    """Whether this rank's part has an entry other than zero, shape (): `any()`, but vectorized."""
    part = local(tensor)
    return torch.stack(torch.aminmax(part)).any() if part.numel() else part.any()


def sample(tensor: Tensor, count: int) -> Tensor:
    """A copy of at least `count` numbers of this rank's part, evenly spread; one dimension."""
    numbers = local(tensor).flatten()
    return numbers[:: max(1, len(numbers) // count)].clone()


def assign(target: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor, which every rank has, into one that may be spread over the ranks."""
    local(target).copy_(local(spread(tensor, target)))


def with_all_experts(stack: Tensor) -> Tensor:
    """A stack, shape (N, *S): each rank has a part of every expert, and no whole expert.

    FSDP2 shards along the experts where it is not told otherwise.
    """
    stack = stack.detach()
    if not is_sharded(stack):
        return stack
    tensor = sys.modules["torch.distributed.tensor"]
    placements = [tensor.Shard(1) if p.is_shard(0) else p for p in stack.placements]
    return stack.redistribute(placements=placements)


def room_for_experts(stack: Tensor, count: int) -> Tensor:
    """Empty memory like a stack's, shape (N, *S), for other experts, shape (count, *S)."""
    stack = with_all_experts(stack)
    part = local(stack).new_empty((count, *local(stack).shape[1:]))
    if not is_sharded(stack):
        return part
    return _from_local(part, stack, torch.Size((count, *stack.shape[1:])))


def ranks_of(tensor: Tensor) -> Ranks | None:
    """The ranks of a DTensor's mesh; None for a plain tensor."""
    if not is_sharded(tensor):
        return None
    mesh = tensor.device_mesh
    return ranks_of_groups([mesh.get_group(dim) for dim in range(mesh.ndim)])


def replicas_of(tensor: Tensor, ranks: Ranks) -> int:
    """How many of the ranks hold the same part of a tensor."""
    if not is_sharded(tensor):
        return ranks.count
    mesh, places = tensor.device_mesh, tensor.placements
    return ranks.count // math.prod(
        mesh.size(dim) for dim, place in enumerate(places) if not place.is_replicate()
    )


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape (*S), spread over the ranks alike, as one of shape (N, *S)."""
    return as_stack(torch.stack([local(part) for part in parts]), parts[0])


def unstacked(stack: Tensor) -> list[Tensor]:
    """The tensors, shape (*S), of a stack, shape (N, *S), in its memory."""
    if not is_sharded(stack):
        return list(stack.detach())
    return [as_expert(part, stack) for part in local(stack)]


def as_expert(part: Tensor, like: Tensor) -> Tensor:
    """A tensor, shape (*S), of this rank's part, spread as one of shape (N, *S) is."""
    return _from_local(part, like, like.shape[1:], moved=-1) if is_sharded(like) else part


def as_stack(part: Tensor, like: Tensor) -> Tensor:
    """A stack, shape (N, *S), of this rank's part, spread as a tensor of shape (*S) is."""
    if not is_sharded(like):
        return part
    return _from_local(part, like, torch.Size((len(part), *like.shape)), moved=1)


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a full stack, shape (N, *S), that is sharded as `like`, shape (*S).

    Every rank has the whole. A dimension that two dimensions of the mesh share is cut as tensor
    parallelism and FSDP2 cut it: by the inner one first where the placement is strided.
    """
    if not is_sharded(like):
        return full
    places: list[Any] = [(dim, p) for dim, p in enumerate(like.placements) if hasattr(p, "dim")]
    mesh = like.device_mesh
    for mesh_dim, place in sorted(places, key=lambda pair: hasattr(pair[1], "split_factor")):
        pieces = full.chunk(mesh.size(mesh_dim), dim=place.dim + 1)
        rank = mesh.get_local_rank(mesh_dim)
        full = pieces[rank] if rank < len(pieces) else full.narrow(place.dim + 1, 0, 0)
    return full.clone(memory_format=torch.contiguous_format)


def padded(tensor: Tensor) -> Tensor:
    """A whole tensor that is zero but for this rank's part."""
    numbers = torch.arange(tensor.numel(), device=local(tensor).device).view(1, *tensor.shape)
    result = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=numbers.device)
    result[part_of(numbers, tensor).flatten()] = local(tensor).flatten()
    return result.view(tensor.shape)


def _from_local(
    part: Tensor,
    like: DTensor,
    shape: torch.Size,
    stride: tuple[int, ...] | None = None,
    *,
    moved: int = 0,
) -> Tensor:
    """A DTensor of this rank's part, each dimension spread as that which is `moved` before it."""
    placements = [_moved(place, moved) for place in like.placements] if moved else like.placements
    tensor = sys.modules["torch.distributed.tensor"].DTensor.from_local(
        part,
        like.device_mesh,
        placements,
        run_check=False,
        shape=shape,
        stride=stride or torch.empty(shape, device="meta").stride(),
    )
    return tensor.to(part.device)  # CPU offload: from_local moves to the mesh's device


def _moved(place: Any, by: int) -> Any:
    """A placement whose dimension is `by` further behind."""
    if not hasattr(place, "dim"):
        return place
    if hasattr(place, "split_factor"):  # FSDP2 over tensor parallelism
        return type(place)(place.dim + by, split_factor=place.split_factor)
    return type(place)(place.dim + by)


def holders_of(tensor: Tensor) -> Ranks:
    """The ranks that together hold a tensor once."""
    if not is_sharded(tensor):
        return ALONE
    dims = [dim for dim, place in enumerate(tensor.placements) if place.is_shard()]
    return ranks_of_groups([tensor.device_mesh.get_group(dim) for dim in dims])
