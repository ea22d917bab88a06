"""Which modules are attention, by what they hold.

A module that holds projections to queries, keys or values is attention, and so is all that lies
inside of it, such as the MLP of a position bias. A layer that holds attention is not attention,
whatever its name. A module that is called attention and holds none of this is attention as well.
A module that holds such projections beside an FFN is a layer; the projections are attention.
"""

from __future__ import annotations

import itertools
import re

from torch import nn

from .ffn_shapes import FFN_NAME, class_name
from .projections import is_wide_ffn, one_projection, projection_of, projections_of

_QKV = re.compile(
    r"^(to_?|w_?|in_proj_|proj_|linear_?|lin_|fc_)?(q|k|v|qk|kv|qkv|query|key|value|queries|keys|values"
    r"|query_key_value|q_[abn]|kv_[ab]|[cqkv]_attn|in_proj)(_?(proj\w*|lin|linear|conv|weight|global))?$",
    re.IGNORECASE,
)
_OUTPUT = re.compile(
    r"^(to_?|w_?|c_|proj_?|linear_?|lin_|fc_)?(o|out|output|proj)(_?(proj\w*|lin|linear|layer))?$",
    re.IGNORECASE,
)
_CALLED = re.compile(r"att(entio)?n", re.IGNORECASE)


def attention_of(model: nn.Module) -> set[nn.Module]:
    """The modules of a model that are attention, or lie inside of it."""
    holding: set[nn.Module] = set()  # modules that are attention, or hold it
    inside: set[nn.Module] = set()
    for fqn, module in reversed(dict(model.named_modules()).items()):  # the inner ones first
        held = holding.intersection(module.children())
        widths = set() if _is_ffn(module) else _widths(module)
        if widths or (_is_called(fqn, module) and not held):
            inside.update(_parts(module, widths) - _ffns_of_width(module, widths))
            holding.add(module)
        elif held:
            holding.add(module)
    return inside


def _parts(module: nn.Module, widths: set[int]) -> set[nn.Module]:
    """What of a module with attention's projections is attention: all, unless it is a layer."""
    own = {name: child for name, child in module.named_children() if projection_of(child)}
    maps = projections_of(child for name, child in own.items() if not _is_attentions(name))
    maps = [p for p in maps if p.in_features in widths or p.out_features in widths]
    if not any(map(is_wide_ffn, itertools.pairwise(maps))):
        return set(module.modules())
    parts = [child for name, child in module.named_children() if _is_attentions(name)]
    return {inner for part in parts for inner in part.modules()}


def _is_attentions(name: str) -> bool:
    return bool(_QKV.search(name) or _OUTPUT.search(name))


def _widths(module: nn.Module) -> set[int]:
    """What the projections of a module to queries, keys and values read; none if it has none."""
    children = {name: child for name, child in module.named_children() if _QKV.search(name)}
    linears = [linear for linear in map(one_projection, children.values()) if linear is not None]
    mixed = [one_projection(children.get(name)) for name in ("key", "value")]
    if is_wide_ffn(projections_of(linear for linear in mixed if linear is not None)):
        return set()  # RWKV's mixing of channels, whose value reads what its key writes
    own = dict(module.named_parameters(recurse=False))
    widths = {p.in_features for p in projections_of(linears)}
    named = [own[name] for name in own if _QKV.search(name) and own[name].ndim > 1]
    if isinstance(module, nn.MultiheadAttention) or len(named) > 1:
        widths |= {size for tensor in named for size in tensor.shape} or {0}
    return widths


def _ffns_of_width(module: nn.Module, widths: set[int]) -> set[nn.Module]:
    """FFNs inside of attention that read what it reads, as in pooling; a bias's MLP reads less."""
    found: set[nn.Module] = set()
    for name, inner in module.named_modules():
        if inner is not module and (_is_ffn(inner) or FFN_NAME.search(name.rpartition(".")[2])):
            linears = projections_of(inner.modules())
            if linears and linears[0].in_features in widths:
                found.update(inner.modules())
    return found


def _is_called(fqn: str, module: nn.Module) -> bool:
    names = (fqn.rpartition(".")[2], class_name(module))
    return any(_CALLED.search(name) and not FFN_NAME.search(name) for name in names)


def _is_ffn(module: nn.Module) -> bool:
    return bool(FFN_NAME.search(class_name(module)))
