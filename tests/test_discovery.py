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
