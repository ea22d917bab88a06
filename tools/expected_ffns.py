"""The FFNs to expect of models of timm and transformers, by the names that these libraries use.

An FFN is a module of a class, or under an attribute, that its library calls an MLP or a
feed-forward network, or a pair of attributes of a Transformer layer (BERT's `intermediate` and
`output`). What the libraries name as something else (a head, an adapter, a gate, a position bias)
is not.

This is what `tools/coverage.py` compares discovery with, so it shares nothing with the package: no
table, no helper, and no rule about what surrounds a linear.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

FFN_CLASS = re.compile(
    r"mlp|ffn|feed_?forward|dense(relu|act|gatedact)dense|swiglu|geglu|^PoolFormerOutput$",
    re.IGNORECASE,
)
FFN_ATTRIBUTE = re.compile(r"(^|_)(mlp\d?|ffn|ff|feed_?forward|mlp_tokens|mlp_channels)$")
OTHER_CLASS = re.compile(
    r"(?<!pooling)head$|classifier|gatemlp$|router|adapter|merger|projector|projection|relpos"
    r"|squeeze|quantizer",
    re.IGNORECASE,
)
OTHER_ATTRIBUTE = re.compile(
    r"classifier|gate$|adapt[eo]r|merger|projector|projection|proj$|scale$|cpb|router|mlp_add"
)
BIAS = re.compile(r"(^|\.)(rel_pos|cpb_mlp|se|attn\.mlp_add|pos_bias)(\.|$)")
BLOCKS = re.compile(r"block|layer|stage|mixer|transformer", re.IGNORECASE)

IN_LAYERS = [
    ("intermediate.dense", "output.dense"),  # BERT and those after it
    ("intermediate_query.dense", "output_query.dense"),  # Q-Formers
    ("layout_intermediate.dense", "layout_output.dense"),  # LiLT
    ("lang_inter.dense", "lang_output.dense"),  # LXMERT
    ("visn_inter.dense", "visn_output.dense"),
    ("fc1", "fc2"),
    ("linear1", "linear2"),
    ("ffn", "ffn_output"),
    ("pwconv1", "pwconv2"),  # ConvNeXt, and SwiftFormer in timm
    ("pointwise_conv1", "pointwise_conv2"),
    ("point_wise_conv1", "point_wise_conv2"),
    ("mlp.c_fc", "mlp.c_proj"),
    ("feed_forward.key", "feed_forward.value"),  # RWKV
]
LAYER_CLASS = re.compile(r"Layer|Block|ConvEncoder|Stage")


def is_mixture(model: nn.Module) -> bool:
    """Whether the library holds experts under that name."""
    return any(re.search(r"(^|\.)(local_|shared_)?experts$", name) for name, _ in _all(model))


def expected_ffns(model: nn.Module) -> set[frozenset[str]]:
    """The names of the linears of each FFN."""
    modules = dict(model.named_modules())
    found: dict[str, frozenset[str]] = {}
    for name, module in modules.items():  # an outer module comes before those inside of it
        if any(_is_inside(name, other) for other in found) or _is_other(name, module):
            continue
        if _is_named_ffn(name, module) and (linears := _chain(name, module, modules)):
            found[name] = linears
    taken = {linear for linears in found.values() for linear in linears}
    pairs = {pair for pair in _pairs(modules) if not pair & taken}
    return set(found.values()) | pairs


def _all(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield from model.named_modules()


def _is_inside(name: str, other: str) -> bool:
    return name.startswith(f"{other}.")


def _is_named_ffn(name: str, module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList):
        return False
    attribute = name.rpartition(".")[2]
    return bool(FFN_CLASS.search(type(module).__name__) or FFN_ATTRIBUTE.search(attribute))


def _is_other(name: str, module: nn.Module) -> bool:
    """Whether it is called something that is not an FFN, or is a part of a bias or a gate."""
    attribute, cls = name.rpartition(".")[2], type(module).__name__
    return bool(OTHER_ATTRIBUTE.search(attribute) or OTHER_CLASS.search(cls) or BIAS.search(name))


def _chain(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> frozenset[str]:
    """The linears of a module of two or three, D to H and H back to D; else nothing."""
    below = {n: m for n, m in module.named_modules(prefix=name) if _widths(m)}
    direct = {n: m for n, m in below.items() if n.rpartition(".")[0] == name}
    return _fitting(name, direct, modules) or _fitting(name, below, modules)


def _fitting(
    name: str, linears: dict[str, nn.Module], modules: dict[str, nn.Module]
) -> frozenset[str]:
    if len(linears) not in (2, 3):
        return frozenset()
    ups = [n for n, m in linears.items() if _widths(m)[0] == _input_width(linears)]
    for last in linears:
        first = [n for n in linears if n != last]
        (width, hidden), (back, out) = _widths(linears[first[0]]), _widths(linears[last])
        if any(_widths(linears[n]) != (width, hidden) for n in first):
            continue
        in_block = BLOCKS.search(type(modules[name.rpartition(".")[0]]).__name__)
        is_back = out == width or (in_block and hidden > 2 * width and len(ups) == len(first))
        in_order = list(linears).index(first[0]) < list(linears).index(last)
        if back in (hidden, hidden / 2) and is_back and back > width / 2 and in_order:
            return frozenset(linears)
    return frozenset()


def _input_width(linears: dict[str, nn.Module]) -> int:
    return _widths(next(iter(linears.values())))[0]


def _pairs(modules: dict[str, nn.Module]) -> Iterator[frozenset[str]]:
    for name, module in modules.items():
        if not LAYER_CLASS.search(type(module).__name__) or _is_other(name, module):
            continue
        for first, last in IN_LAYERS:
            names = [f"{name}.{part}".removeprefix(".") for part in (first, last)]
            if not all(n in modules and _widths(modules[n]) for n in names):
                continue
            (width, hidden), (back, out) = (_widths(modules[n]) for n in names)
            if back in (hidden, hidden / 2) and out == width and back > width / 2:
                yield frozenset(names)


def _widths(module: Any) -> tuple[int, ...]:
    """(in, out) of a linear, a 1x1 convolution or GPT-2's Conv1D; () of all else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv1d | nn.Conv2d) and set(module.kernel_size) == {1}:
        return (module.in_channels, module.out_channels) if module.groups == 1 else ()
    return (module.nx, module.nf) if type(module).__name__ == "Conv1D" else ()
