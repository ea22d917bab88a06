"""Which linears are chosen, and which of them share fusion weights."""

import pytest
import timm
import torch
from torch import nn

import exfusion_param as exf
from exfusion_testing.models import FFNs


def groups(model: nn.Module, **kwargs) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for linear in exf.summarize(model, variant="sw", **kwargs).linears:
        found.setdefault(linear.group, []).append(linear.name)
    return found


def test_vit_and_deit_ffns_are_found_and_nothing_else() -> None:
    for name in ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"):
        model = timm.create_model(name, depth=2)
        assert groups(model) == {
            f"blocks.{i}.mlp": [f"blocks.{i}.mlp.fc1", f"blocks.{i}.mlp.fc2"] for i in range(2)
        }


def test_torch_transformer_layers_are_found() -> None:
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    assert groups(model) == {
        f"{part}.layers.0": [f"{part}.layers.0.linear1", f"{part}.layers.0.linear2"]
        for part in ("encoder", "decoder")
    }


def test_subclasses_of_a_known_class_are_found() -> None:
    class Layer(nn.TransformerEncoderLayer):
        pass

    assert groups(Layer(8, 2, 16)) == {"Layer": ["linear1", "linear2"]}


def test_globs_name_linears_and_keep_those_of_one_ffn_together() -> None:
    assert groups(FFNs(), filter_fn=["blocks.1.*"]) == {
        "blocks.1": ["blocks.1.fc1", "blocks.1.fc2"]
    }
    assert groups(FFNs(), filter_fn=["*.fc2"]) == {
        "blocks.0": ["blocks.0.fc2"],
        "blocks.1": ["blocks.1.fc2"],
    }
    assert groups(FFNs(), filter_fn="head") == {"FFNs": ["head"]}


def test_a_filter_chooses_any_linear_and_groups_by_the_module_that_holds_it() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    chosen = groups(model, filter_fn=lambda module, fqn: "attn" in fqn or fqn.endswith("fc1"))
    assert chosen == {
        "blocks.0.attn": ["blocks.0.attn.qkv", "blocks.0.attn.proj"],
        "blocks.0.mlp": ["blocks.0.mlp.fc1"],
    }


def test_a_filter_sees_every_linear_with_its_module() -> None:
    model, seen = FFNs(depth=1), {}
    groups(model, filter_fn=lambda module, fqn: seen.update({fqn: type(module)}) or True)
    assert seen == dict.fromkeys(("stem", "blocks.0.fc1", "blocks.0.fc2", "head"), nn.Linear)


@pytest.mark.parametrize("shared_router", [True, False])
def test_a_flat_model_of_the_users_own_trains(shared_router: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    exf.wrap(model, filter_fn=["0", "2"], shared_router=shared_router)
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.01))
    before = model[2].parametrizations.weight.original.detach().clone()
    model(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[2].parametrizations.weight.original, before)
    assert len(exf.fuse(model)) == 3


def test_two_linears_with_a_narrow_middle_are_no_ffn_by_their_structure() -> None:
    class Squeeze(nn.Module):
        def __init__(self, hidden: int) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(8, hidden), nn.Linear(hidden, 8)

    model = nn.ModuleList([Squeeze(4), Squeeze(16)])
    assert groups(model) == {"1": ["1.one", "1.other"]}


class Block(nn.Module):
    """A layer with attention, and parts beside it."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        for name, part in parts.items():
            self.add_module(name, part)


class Intermediate(nn.Module):
    """One linear with its activation, or its norm."""

    def __init__(self, features: int, out: int) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(features, out), nn.LayerNorm(out)


class MlpOfConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16))
        self.reduce = nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))


class Widening(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(8, 32), "fc2": nn.Linear(32, 16)})


def test_two_streams_in_one_layer_are_two_ffns() -> None:
    streams = {"here": Intermediate(8, 16), "there": Intermediate(16, 8)}
    streams |= {"here_query": Intermediate(8, 24), "there_query": Intermediate(24, 8)}
    assert groups(Block(**streams)) == {
        "here": ["here.dense", "there.dense"],
        "here_query": ["here_query.dense", "there_query.dense"],
    }


def test_convolutions_with_their_norms_are_an_ffn_where_a_class_is_called_so() -> None:
    assert groups(nn.Sequential(MlpOfConvolutions())) == {"0": ["0.expand.0", "0.reduce.0"]}


def test_an_ffn_beside_attention_may_widen_its_output() -> None:
    assert groups(Widening()) == {"mlp": ["mlp.fc1", "mlp.fc2"]}


def named(first: str, features: int, hidden: int, last: str) -> nn.Module:
    module = nn.Module()
    module.add_module(first, nn.Linear(features, hidden))
    module.add_module(last, nn.Linear(hidden, features))
    return module


def test_named_linears_with_a_middle_far_narrower_than_the_outside_are_no_ffn() -> None:
    squeeze, narrow = named("fc1", 16, 8, "fc2"), named("fc1", 16, 15, "fc2")
    adapter = named("down_proj", 24, 16, "up_proj")
    model = nn.ModuleDict({"squeeze": squeeze, "narrow": narrow, "adapter": adapter})
    assert groups(model) == {"narrow": ["narrow.fc1", "narrow.fc2"]}


class MaskedAttentionLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(8, 2)
        self.post_attention_ffn = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))


def test_a_layer_that_holds_attention_is_not_attention() -> None:
    assert list(groups(MaskedAttentionLayer())) == ["post_attention_ffn"]


def test_a_position_bias_inside_of_attention_is_no_ffn_and_a_pools_is_one() -> None:
    class Pool(nn.Module):
        def __init__(self, features: int) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.mlp = named("fc1", features, 32, "fc2")

    model = nn.ModuleDict({"window": Pool(2), "pool": Pool(8)})
    assert groups(model) == {"pool.mlp": ["pool.mlp.fc1", "pool.mlp.fc2"]}


def test_what_looks_like_an_ffn_and_is_left_warns_with_a_filter_that_takes_it() -> None:
    class Merger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(8, 16), nn.Linear(16, 8)

    model = nn.ModuleDict({"blocks": nn.ModuleList([FFNs(8, 12)]), "merger": Merger()})
    with pytest.warns(UserWarning, match="leaves 1 x 8 -> 16 -> 8 dense") as caught:
        summary = exf.summarize(model)
    assert summary.left_dense == ("1 x 8 -> 16 -> 8, merger.one and merger.other",)
    assert "\nleft dense: 1 x 8 -> 16 -> 8, merger.one and merger.other\n" in str(summary)
    (message,) = (str(warning.message) for warning in caught)
    assert len(message) < 400
    assert "filter_fn=[('merger.one', 'merger.other')]" in message
    assert groups(model, filter_fn=[("merger.one", "merger.other")]) == {
        "merger": ["merger.one", "merger.other"]
    }
    exf.wrap(model, filter_fn=[("merger.one", "merger.other")])
    assert exf.summarize(model).left_dense == (
        "2 x 8 -> 12 -> 8, blocks.0.blocks.*.fc1 and blocks.0.blocks.*.fc2",
    )


def test_tuples_of_globs_name_the_linears_of_each_ffn() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    model = nn.ModuleDict({"a": model, "b": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})
    assert groups(model, filter_fn=[("*.0", "*.1"), ("a.2", "a.3")]) == {
        "a.0": ["a.0", "a.1"],
        "b": ["b.0", "b.1"],
        "a.2": ["a.2", "a.3"],
    }
    with pytest.raises(ValueError, match=r"\('a.\*', 'b.\*'\) match 4 and 2 linears"):
        groups(model, filter_fn=[("a.*", "b.*")])


def test_filters_see_through_modules_that_hold_one_linear() -> None:
    model = nn.Sequential(Intermediate(8, 4), Intermediate(4, 8))
    assert groups(model, filter_fn=["*"]) == {"Sequential": ["0.dense", "1.dense"]}


class Switch(nn.Module):
    def __init__(self, experts: int, choices: int) -> None:
        super().__init__()
        self.gate = nn.Linear(8, choices)
        self.parts = nn.ModuleList(named("fc1", 8, 16, "fc2") for _ in range(experts))


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.up, self.down = (nn.Parameter(torch.zeros(4, *s)) for s in ((8, 16), (16, 8)))


@pytest.mark.parametrize("mixture", [Switch(3, 3), Stacked()])
def test_mixtures_are_refused_by_what_they_do(mixture: nn.Module) -> None:
    model = nn.Sequential(mixture, named("fc1", 8, 16, "fc2"))
    with pytest.raises(ValueError, match="is a mixture of experts already: 0 is a"):
        exf.wrap(model)
    assert groups(model, filter_fn=["1.*"]) == {"1": ["1.fc1", "1.fc2"]}


def test_ffns_in_a_list_beside_another_linear_are_no_mixture() -> None:
    assert len(groups(Switch(3, 4))) == 3
    assert len(groups(FFNs(depth=3))) == 3  # with a head to as many classes
