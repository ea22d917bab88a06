"""Models that discovery has not seen: what it takes, leaves with a warning, or refuses."""

import ast
import copy
import itertools
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import exfusion_param as exf


def part(**children: nn.Module) -> nn.Module:
    """A module of an unknown class with these children."""
    module = type("Part", (nn.Module,), {})()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def called(name: str, module: nn.Module) -> nn.Module:
    """The module, of a class of that name."""
    module.__class__ = type(name, (type(module),), {})
    return module


def linears(**widths: tuple[int, int]) -> nn.Module:
    return part(**{name: nn.Linear(*each) for name, each in widths.items()})


def attention() -> nn.Module:
    return linears(qkv=(8, 24), proj=(8, 8))


def ffn() -> nn.Module:
    return linears(fc1=(8, 32), fc2=(32, 8))


def row(*widths: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(widths)))


def beside_known(**others: nn.Module) -> nn.Module:
    """A model of one common layer, and others beside it."""
    return part(layers=nn.ModuleList([part(attn=attention(), mlp=ffn())]), **others)


KNOWN = ["layers.0.mlp.fc1", "layers.0.mlp.fc2"]


def found(model: nn.Module, **kwargs: Any) -> list[list[str]]:
    """The linears of each FFN."""
    groups: dict[str, list[str]] = {}
    for linear in exf.summarize(model, variant="sw", **kwargs).linears:
        groups.setdefault(linear.group, []).append(linear.name)
    return list(groups.values())


def flat(**widths: tuple[int, int]) -> nn.Module:
    """A layer that holds attention's projections itself."""
    return linears(q=(8, 16), k=(8, 16), v=(8, 16), o=(16, 8), **widths)


TAKEN = {
    "flat layer, known names": (flat(fc1=(8, 32), fc2=(32, 8)), ["fc1", "fc2"]),
    "flat layer, new names": (flat(alpha=(8, 32), beta=(32, 8)), ["alpha", "beta"]),
    "flat layer, one projection": (
        linears(to_qkv=(8, 48), to_out=(16, 8), one=(8, 32), two=(32, 8)),
        ["one", "two"],
    ),
    "RWKV's mixing of channels": (
        linears(key=(8, 32), receptance=(8, 8), value=(32, 8)),
        ["key", "value"],
    ),
    "FT-Transformer's dict": (
        nn.ModuleDict(
            {"attention": attention(), "linear0": nn.Linear(8, 64), "linear1": nn.Linear(32, 8)}
        ),
        ["linear0", "linear1"],
    ),
}


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.filterwarnings("error")
def test_the_ffn_of_an_unknown_layer_is_found(name: str) -> None:
    layer, expected = TAKEN[name]
    names = [f"layers.1.{linear}" for linear in expected]
    model = beside_known()
    model.layers.append(layer)
    assert found(model) == [KNOWN, names]
    assert found(part(layers=nn.ModuleList([layer])))[0] == [n.replace("1", "0", 1) for n in names]


ATTENTION = {
    "wide": flat(),
    "gated": flat(g_proj=(8, 16), out_proj=(16, 8)),
    "RWKV's mixing of times": linears(
        key=(8, 16), value=(8, 16), receptance=(8, 16), output=(16, 8)
    ),
    "low rank": linears(q_a=(8, 16), q_b=(16, 8), kv=(8, 16), o=(8, 8)),
    "recurrent": part(into=nn.Linear(8, 16), rnn=nn.LSTM(16, 16), back=nn.Linear(16, 8)),
}


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.filterwarnings("error")
def test_what_mixes_tokens_is_neither_wrapped_nor_reported_as_an_ffn(name: str) -> None:
    model = beside_known()
    model.layers.append(part(mixer=ATTENTION[name], mlp=ffn()))
    assert found(model) == [KNOWN, [n.replace("0", "1", 1) for n in KNOWN]]
    exf.wrap(model)


LEFT = {
    "time_embed": row(8, 32, 8),
    "embed": row(8, 32, 8),
    "pos_mlp": row(8, 32, 8),
    "predictor": row(8, 32, 8),
    "t_embedder": called("TimestepEmbedder", part(mlp=row(8, 32, 8))),
    "net": called("ImageProjector", part(norm=nn.LayerNorm(8), net=row(8, 32, 8))),
    "out": row(8, 32, 8),
}


def filters_in(text: str) -> list[list[Any]]:
    """The filters that a message gives, as Python reads them."""
    return [ast.literal_eval(each) for each in re.findall(r"filter_fn=(\[.*?\])\)", text)]


def left(model: nn.Module) -> tuple[str, list[Any]]:
    """What `wrap` warns of, and the filter that it gives."""
    with pytest.warns(UserWarning, match=r"wrap\(\) leaves") as caught:
        assert found(model) == [KNOWN]
    (message,) = (str(each.message) for each in caught)
    (chosen,) = filters_in(message)
    return message, chosen


@pytest.mark.parametrize("name", LEFT)
def test_heads_and_embeddings_are_left_with_a_filter_that_takes_them(name: str) -> None:
    model = beside_known(**{name: LEFT[name]})
    message, chosen = left(model)
    assert f"leaves 1 x 8 -> 32 -> 8 dense, which looks like an FFN: {name}." in message
    names = [fqn for fqn, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert found(model, filter_fn=chosen) == [[fqn for fqn in names if fqn.startswith(name)]]


def test_by_structure_an_ffn_that_is_the_only_one_is_taken_wherever_it_is() -> None:
    assert found(part(out=row(8, 32, 8), head=nn.Linear(8, 3))) == [["out.0", "out.1"]]


def test_rows_of_three_are_left_whole_and_named_by_numbers_that_do_not_vary() -> None:
    model = beside_known()
    model.layers.extend(part(attn=attention(), mlp=row(8, 32, 32, 8)) for _ in range(2))
    message, chosen = left(model)
    assert "leaves 2 x 8 -> 32 -> 8 dense" in message
    assert chosen == [tuple(f"layers.*.mlp.{i}" for i in range(3))]
    names = [[f"layers.{layer}.mlp.{i}" for i in range(3)] for layer in (1, 2)]
    assert found(model, filter_fn=chosen) == names


def test_names_are_given_where_a_glob_would_match_others_too() -> None:
    model = beside_known(
        parts=nn.ModuleList([called("Adapter", linears(a=(8, 16), b=(16, 8))), linears(a=(8, 9))])
    )
    _, chosen = left(model)
    assert chosen == [("parts.0.a", "parts.0.b")]


def test_a_refusal_names_what_looks_like_an_ffn_with_a_filter_that_takes_it() -> None:
    model = part(layers=nn.ModuleList([part(attn=attention(), mlp=row(8, 32, 32, 8))]))
    with pytest.raises(ValueError, match=r"No FFN was found .* look like one\.") as caught:
        exf.wrap(model)
    *_, chosen = filters_in(str(caught.value))
    assert found(model, filter_fn=chosen) == [[f"layers.0.mlp.{i}" for i in range(3)]]


FUSED = {
    "PaLM": (
        linears(fused_attn_ff_proj=(8, 80), attn_out=(8, 8)),
        "fused_attn_ff_proj",
        "ff_out.1",
    ),
    "ViT-22B": (linears(in_proj=(8, 56), attn_out_proj=(8, 8)), "in_proj", "ff_out.1"),
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("is_beside", [True, False])
def test_an_ffn_whose_first_linear_feeds_attention_too_is_named(name: str, is_beside: bool) -> None:
    model = beside_known() if is_beside else part(layers=nn.ModuleList())
    layer, first, last = FUSED[name]
    layer = copy.deepcopy(layer)
    layer.add_module("ff_out", nn.Sequential(nn.SiLU(), nn.Linear(32, 8)))
    model.layers.append(layer)
    if is_beside:
        message, chosen = left(model)
        assert f"leaves 1 x 8 -> 32 of {80 if name == 'PaLM' else 56} -> 8 dense" in message
    else:
        with pytest.raises(ValueError, match=r"No FFN was found .* look like one\.") as caught:
            exf.wrap(model)
        *_, chosen = filters_in(str(caught.value))
    at = len(model.layers) - 1
    assert found(model, filter_fn=chosen) == [[f"layers.{at}.{first}", f"layers.{at}.{last}"]]


class Dense(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


class Matrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(torch.zeros(s)) for s in ((8, 32), (32, 8)))


@pytest.mark.parametrize("other", [Matrices(), part(w1=Dense(32, 8), w2=Dense(8, 32))])
def test_ffns_that_are_no_linears_are_left_with_a_warning(other: nn.Module) -> None:
    model = beside_known()
    model.layers.append(part(attn=attention(), mlp=other))
    with pytest.warns(UserWarning, match="8 -> 32 -> 8 .* layers.1.mlp.w1 .* make each a torch.nn"):
        exf.wrap(model)
    with pytest.raises(ValueError, match=r"w1 and layers.0.mlp.w2 look like one\. Only"):
        exf.wrap(part(layers=nn.ModuleList([part(attn=attention(), mlp=other)])))
    low_rank = beside_known(lora=part(a=Dense(2, 8), b=Dense(8, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exf.wrap(low_rank)


class MatrixRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.zeros(8, 3))
        self.parts = nn.ModuleList(ffn() for _ in range(3))


MIXTURES = {
    "a matrix routes": MatrixRouter(),
    "a list by its name": part(experts=nn.ModuleList(ffn() for _ in range(2))),
    "attributes by their names": part(expert_0=ffn(), expert_1=ffn()),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_without_a_linear_that_routes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is a mixture of experts already: moe"):
        exf.wrap(beside_known(moe=MIXTURES[name]))
