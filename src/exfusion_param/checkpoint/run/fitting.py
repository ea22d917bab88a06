"""Whether what was saved fits what is to load it, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...finding.outer_modules import listed
from ..files.errors import CheckpointError
from ..files.plain_values import same


def common(name: str, values: Sequence[Any]) -> Any:
    """The values that all ranks had.

    Raises:
        CheckpointError: they differ.
    """
    if not all(same(value, values[0]) for value in values[1:]):
        raise CheckpointError(
            f"{name} is not the same on the {len(values)} ranks that saved it, so it only loads on "
            f"as many. Resume on {len(values)} ranks, or without it: "
            f"resume(leave_out=[{name!r}])."
        )
    return values[0]


def refuse_other_names(part: str, ours: Mapping[str, Any], stored: Mapping[str, Tensor]) -> None:
    """Raise if a part has other tensors than were saved."""
    missing = [name for name in ours if name not in stored]
    unknown = [name for name in stored if name not in ours]
    kinds = ["step", "forward"]
    saved, here = (any(".parametrizations." in name for name in names) for names in (stored, ours))
    if saved != here:
        raise CheckpointError(
            f'{part} was saved under fuse_on="{kinds[saved]}", or dense, but the model is wrapped '
            f'with "{kinds[here]}", which stores experts elsewhere. Wrap the model as it was when '
            "saved, or fuse the checkpoint and load it with load_dense_state_dict."
        )
    if missing or unknown:
        raise CheckpointError(
            f"{part}: the checkpoint does not match this model. Missing: "
            f"{listed(missing) or 'nothing'}; unexpected: {listed(unknown) or 'nothing'}."
        )


def refuse_other_shape(name: str, tensor: Tensor, stored: Tensor) -> None:
    """Raise if a tensor was saved in another shape."""
    shape = tuple(tensor.shape)
    if shape == stored.shape:
        return
    if shape[1:] == stored.shape[1:] and (".parametrizations." in name or "/experts" in name):
        raise CheckpointError(
            f"{name} was saved with {stored.shape[0]} experts, the model has {shape[0]}. Wrap it "
            f"with num_experts={stored.shape[0]}, or call resume(resize_experts=True), which adds "
            "or merges experts without changing the fused weights."
        )
    raise CheckpointError(
        f"{name} was saved in shape {tuple(stored.shape)}, and is of shape {shape} here."
    )
