"""Which modules are attention, by what they hold.

A module that holds projections to queries, keys or values is attention, and so is all that lies
inside of it, such as the MLP of a position bias. A layer that holds attention is not attention,
whatever its name. A module that is called attention and holds none of this is attention as well.
"""

from __future__ import annotations

import re

from torch import nn

from .ffn_shapes import FFN_NAME, class_name
from .projections import projection_of

_QKV = re.compile(
    r"^(to_?|w_?|in_proj_|proj_|linear_?|lin_|fc_)?(q|k|v|qk|kv|qkv|query|key|value|queries|keys|values"
    r"|query_key_value|q_[abn]|kv_[ab]|[cqkv]_attn|in_proj)(_?(proj\w*|lin|linear|conv|weight|global))?$",
    re.IGNORECASE,
)
_CALLED = re.compile(r"att(entio)?n", re.IGNORECASE)


def attention_of(model: nn.Module) -> set[nn.Module]:
    """The modules of a model that are attention, or lie inside of it."""
    modules = dict(model.named_modules())
    holding: set[nn.Module] = set()  # modules that are attention, or hold it
    inside: set[nn.Module] = set()
    for fqn, module in reversed(modules.items()):  # what is inside of a module comes before it
        held = holding.intersection(module.children())
        if _holds_qkv(module) or (_is_called(fqn, module) and not held):
            inside.update(module.modules())
            holding.add(module)
        elif held:
            holding.add(module)
    return inside


def _holds_qkv(module: nn.Module) -> bool:
    """Whether a module holds projections to queries, keys or values, of which an FFN has none."""
    if _is_ffn(module):
        return False
    if isinstance(module, nn.MultiheadAttention):
        return True
    named = [n for n, child in module.named_children() if _is_one_projection(child)]
    named += [n for n, parameter in module.named_parameters(recurse=False) if parameter.ndim > 1]
    return any(_QKV.search(name) for name in named)


def _is_one_projection(module: nn.Module) -> bool:
    if projection_of(module):
        return True
    weights = [p for p in module.parameters() if p.ndim > 1]
    return len(weights) == 1


def _is_called(fqn: str, module: nn.Module) -> bool:
    names = (fqn.rpartition(".")[2], class_name(module))
    return not _is_ffn(module) and any(
        _CALLED.search(n) and not FFN_NAME.search(n) for n in names
    )


def _is_ffn(module: nn.Module) -> bool:
    return bool(FFN_NAME.search(class_name(module)))
