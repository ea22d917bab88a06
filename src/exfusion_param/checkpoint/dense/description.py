"""Describes the tensors of a wrapped checkpoint, as plain values that a file can store.

The names in a wrapped checkpoint do not say which linears share fusion weights, so `save_config`
writes that into the config.json beside it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...atomic_files import write_file
from ...expert_config import ENTRY
from ...finding.outer_modules import clean_name, unwrapped
from ...fusion.lookup import fused_names, fusion_weights_of, groups_of
from ...fusion_weights.base import FusionWeights
from ...state_dict import dense_keys
from ...tensors.shards import local
from ..files.reader import CONFIG, read_config


def describe(model: nn.Module) -> dict[str, Any]:
    """Describe a wrapped model's tensors, as plain values for JSON or a torch checkpoint.

    Returns:
        `version`; `wraps`, for each method and config the FFN groups with their linears and fused
        tensors, and under `fuse_on="step"` the names of their fusion weights; `keys`, those of the
        dense state dict; `tied`, lists of keys that are one tensor.

    Raises:
        ValueError: nothing is wrapped.
    """
    model = unwrapped(model)
    group_names = groups_of(model)
    wraps: list[dict[str, Any]] = []
    for fusion_weights, linears in _linears_of_groups(model).items():
        config = fusion_weights.config.to_dict()
        wrap = next((wrap for wrap in wraps if wrap["config"] == config), None)
        if wrap is None:
            method = fusion_weights.config.label.split()[0]
            wraps.append(wrap := {"method": method, "config": config, "groups": []})
        group: dict[str, Any] = {"name": group_names[fusion_weights], "linears": linears}
        if fusion_weights.fused:
            group["fusion_weights"] = _names_of(model, fusion_weights)
        wrap["groups"].append(group)
    if not wraps:
        raise ValueError(f"{type(model).__name__} has no wrapped linear to describe.")
    keys = [clean_name(key) for key in dense_keys(model)]
    return {"version": 1, "wraps": wraps, "keys": keys, "tied": _tied_names(model)}


def _linears_of_groups(model: nn.Module) -> dict[FusionWeights, dict[str, list[str]]]:
    """For each group its linears' names, all of them where a module has several, and tensors."""
    groups: dict[FusionWeights, dict[str, list[str]]] = defaultdict(dict)
    for fqn, linear in model.named_modules(remove_duplicate=False):
        if names := fused_names(linear):
            groups[fusion_weights_of(linear)][clean_name(fqn)] = names
    return groups


def _names_of(model: nn.Module, group: FusionWeights) -> list[str]:
    """The names in the state dict of a group's fusion weights, which a dense model lacks."""
    ids = set(map(id, group.own_tensors()))
    kept = model.state_dict(keep_vars=True)
    return [clean_name(name) for name, value in kept.items() if id(value) in ids]


def _tied_names(model: nn.Module) -> list[list[str]]:
    """Names that share memory in the state dict; a file may hold one of them."""
    owners: dict[Any, list[str]] = defaultdict(list)
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and local(value).numel() > 0 and not value.is_meta:
            key = (local(value).data_ptr(), value.shape, value.dtype)
            owners[key].append(clean_name(name))
    return [names for names in owners.values() if len(names) > 1]


def save_config(model: nn.Module, folder: str | Path) -> Path:
    """Record in a folder's config.json how to fuse its wrapped checkpoint.

        save_file(model.state_dict(), "run/model.safetensors")  # or torch.save, or a trainer
        save_config(model, "run")
        # exfusion fuse run dense

    Args:
        model: the wrapped model whose state dict is in the folder.
        folder: the folder of the checkpoint. Other entries of its config.json are kept.

    Returns:
        The path of config.json.

    Raises:
        ValueError: nothing is wrapped, or config.json does not contain a JSON object.
    """
    return write_description(describe(model), Path(folder))


def write_description(description: dict[str, Any], folder: Path) -> Path:
    """Add what `describe` gives to a folder's config.json, and return that file's path."""
    path = folder / CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    config = read_config(path.parent) | {ENTRY: description}
    write_file(path, f"{json.dumps(config, indent=2)}\n".encode())
    return path
