"""Finds the Transformer blocks of a wrapped model: what FSDP2 gathers one at a time."""

from __future__ import annotations

from torch import nn

from ..finding.discovery import parents_of
from ..fusion.lookup import groups_of, wrapped_linears


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model that hold one FFN each.

    An element of an `nn.ModuleList`, `nn.ModuleDict` or `nn.Sequential` that holds an FFN is a
    block, or lies within one: T5 keeps attention and FFN in a list within each block. The block is
    the largest element that holds no more FFNs than the smallest one. A list or a dict of modules
    is none, as it has no forward at which FSDP2 could gather it. Where FFNs of a block have
    elements of their own in it, as in MobileBERT, the block is one.

    Returns:
        The blocks in the order of the model, none twice and none within another.
    """
    first = _first_linears(model)
    blocks = {}
    for fqn in first:
        around = reversed(parents_of(fqn)[:-1])  # the largest first, without the model itself
        elements = [path for path in around if _is_element(model, path)]
        counts = [sum(other.startswith(f"{path}.") for other in first) for path in elements]
        fitting = [path for path, n in zip(elements, counts, strict=True) if n == min(counts)]
        if fitting:
            blocks[fitting[0]] = model.get_submodule(fitting[0])
    outermost = (n for n in blocks if not any(n.startswith(f"{other}.") for other in blocks))
    return list(dict.fromkeys(blocks[name] for name in outermost))


def _first_linears(model: nn.Module) -> list[str]:
    """The name of the first linear of each FFN group."""
    firsts = {group.linears[0] for group in groups_of(model)}
    return [fqn for fqn, linear in wrapped_linears(model).items() if linear in firsts]


def _is_element(model: nn.Module, path: str) -> bool:
    parent = model.get_submodule(path.rpartition(".")[0])
    has_forward = not isinstance(model.get_submodule(path), nn.ModuleList | nn.ModuleDict)
    return has_forward and isinstance(parent, nn.ModuleList | nn.ModuleDict | nn.Sequential)
