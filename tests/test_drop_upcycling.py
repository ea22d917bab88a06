"""Drop-upcycling: each expert keeps the pretrained weight but for some hidden units."""

import pytest
import torch
import transformers
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_testing.families import BERT, FAMILIES
from exfusion_testing.models import FFNs

KWARGS = {"variant": "sw", "expert_init": "drop_upcycle", "seed": 0}


def stack(linear: nn.Module, name: str = "weight") -> Tensor:
    return linear.parametrizations[name].original.detach()


def changed(experts: Tensor, dense: Tensor, dim: int) -> list[set[int]]:
    """For each expert the indices along `dim` where it differs from the dense tensor."""
    differs = (experts != dense).movedim(dim + 1, 1)
    differs = differs.reshape(len(experts), dense.shape[dim], -1).any(-1)
    return [set(row.nonzero().flatten().tolist()) for row in differs]


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_the_same_units_change_in_every_linear_and_nothing_else(ratio: float) -> None:
    model = FFNs(dim=8, hidden=32)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    exf.wrap(model, **KWARGS, drop_ratio=ratio, num_experts=3)
    block = model.blocks[0]
    units = changed(stack(block.fc1), dense["blocks.0.fc1.weight"], 0)
    assert [len(chosen) for chosen in units] == [32 * ratio] * 3
    assert changed(stack(block.fc1, "bias"), dense["blocks.0.fc1.bias"], 0) == units
    assert changed(stack(block.fc2), dense["blocks.0.fc2.weight"], 1) == units
    assert torch.equal(stack(block.fc2, "bias"), dense["blocks.0.fc2.bias"].expand(3, -1))
    if ratio < 1:
        assert units[0] != units[1]


def test_new_entries_have_the_weights_own_mean_and_deviation() -> None:
    model = FFNs(dim=100, hidden=400, depth=1)
    with torch.no_grad():
        model.blocks[0].fc1.weight.normal_(0.5, 2.0)
    exf.wrap(model, **KWARGS, drop_ratio=1.0)
    drawn = stack(model.blocks[0].fc1)
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.03)
    assert drawn.std().item() == pytest.approx(2.0, rel=0.02)


def test_gpt2s_transposed_weights_change_along_the_hidden_units() -> None:
    model = FAMILIES["GPT-2"].make()
    mlp = model.h[0].mlp
    dense = {name: value.detach().clone() for name, value in mlp.named_parameters()}
    exf.wrap(model, **KWARGS)
    units = changed(stack(mlp.c_fc), dense["c_fc.weight"], 1)
    assert [len(chosen) for chosen in units] == [32] * 4
    assert changed(stack(mlp.c_proj), dense["c_proj.weight"], 0) == units


def test_a_gate_loses_the_units_that_its_value_loses() -> None:
    model = transformers.AutoModel.from_config(
        transformers.AutoConfig.for_model("phi3", **BERT, pad_token_id=0)
    )
    mlp = model.layers[0].mlp
    dense = mlp.gate_up_proj.weight.detach().clone()
    down = mlp.down_proj.weight.detach().clone()
    exf.wrap(model, **KWARGS)
    for both, units in zip(
        changed(stack(mlp.gate_up_proj), dense, 0),
        changed(stack(mlp.down_proj), down, 1),
        strict=True,
    ):
        assert both == units | {unit + 32 for unit in units}


def test_part_of_an_ffn_is_refused_and_the_model_unchanged() -> None:
    model = FFNs()
    with pytest.raises(ValueError, match="'blocks.0' is not a whole FFN"):
        exf.wrap(model, **KWARGS, filter_fn=["*.fc1"])
    assert type(model.blocks[0].fc1) is nn.Linear


def test_the_model_trains_and_fuses_with_a_uniform_bank() -> None:
    model = FFNs()
    exf.wrap(model, expert_init="drop_upcycle", bank_init="uniform", shared_router=False)
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.0))
    model(torch.randn(2, 3, 4)).sum().backward()
    optimizer.step()
    exf.fuse(model)


@pytest.mark.parametrize(("ratio", "count"), [(0.01, 1), (0.2, 1), (0.25, 2), (0.5, 4)])
def test_the_share_of_units_is_rounded(ratio: float, count: int) -> None:
    model = FFNs(dim=4, hidden=7, depth=1)
    dense = model.blocks[0].fc1.weight.detach().clone()
    exf.wrap(model, **KWARGS, drop_ratio=ratio, num_experts=2)
    assert [len(units) for units in changed(stack(model.blocks[0].fc1), dense, 0)] == [count] * 2
