"""Adapters, pruning, quantization and offloading of a wrapped model, `fuse_on="forward"`."""

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from peft import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor, nn
from torch.nn.utils import prune

import exfusion_param as exf
from exfusion_testing.models import FFNs, inputs, loss_of

VARIANTS = ["sw", "dw", "mb"]
CPU = torch.device("cpu")


def wrapped(variant: str = "mb", model: nn.Module | None = None, **fields: Any) -> Any:
    fields = {"bank_init": "uniform", "seed": 0} | fields
    return exf.wrap(FFNs() if model is None else model, variant=variant, **fields)


def x() -> Tensor:
    return inputs().float()


def adapted(variant: str, **config: Any) -> Any:
    """A wrapped model with adapters that have trained."""
    model = get_peft_model(wrapped(variant), LoraConfig(r=2, **config))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        loss_of(model, x()).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("safe", [True, False])
def test_a_lora_merge_is_refused_before_fuse_and_exact_after(variant: str, safe: bool) -> None:
    model = adapted(variant, target_modules=["fc1", "fc2"])
    with model.disable_adapter():
        base = model(x())
    expected = model(x())
    assert (expected - base).abs().max() > 1e-3
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=safe)
    for _ in range(3):  # each linear says it once
        with pytest.raises(RuntimeError, match=r"is lost: .* call fuse\(model\) before merging"):
            exf.fuse(merged)
    exf.fuse(model)
    merged = model.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(merged(x()), expected)
    assert type(merged.blocks[0].fc1) is nn.Linear


ADAPTERS: list[Any] = [
    LoraConfig(target_modules=["fc1", "fc2"], r=2, use_dora=True, init_lora_weights=False),
    LoraConfig(target_modules=["fc1"], r=2, use_rslora=True, bias="all", init_lora_weights=False),
    LoHaConfig(target_modules=["fc1", "fc2"], r=2, init_weights=False),
    LoKrConfig(target_modules=["fc2"], r=2, init_weights=False),
    VeraConfig(target_modules=["fc1"], r=2, init_weights=False),
    OFTConfig(target_modules=["fc1"], r=2, oft_block_size=0, init_weights=False),
    HRAConfig(target_modules=["fc1"], r=2, init_weights=False),
    IA3Config(target_modules=["fc1"], feedforward_modules=["fc1"], init_ia3_weights=False),
]


@pytest.mark.parametrize("config", ADAPTERS, ids=lambda config: type(config).__name__)
def test_every_kind_of_adapter_merges_into_what_it_computed_or_is_refused(config: Any) -> None:
    model = get_peft_model(wrapped("dw"), config).eval()
    expected = model(x())
    with pytest.raises(RuntimeError, match=r"is lost: .* call fuse\(model\) before merging"):
        exf.fuse(copy.deepcopy(model).merge_and_unload())
    exf.fuse(model)
    torch.testing.assert_close(model.merge_and_unload()(x()), expected)
    by_step = get_peft_model(wrapped("dw", fuse_on="step"), config).eval()
    expected = by_step(x())
    torch.testing.assert_close(exf.fuse(by_step.merge_and_unload())(x()), expected)


def test_what_freezes_or_takes_the_weight_itself_fails_under_forward_and_works_under_step() -> None:
    from torchao.float8 import convert_to_float8_training

    config = AdaLoraConfig(target_modules=["fc1"], total_step=10)
    with pytest.raises(RuntimeError, match="leaf"):
        get_peft_model(wrapped(), config)
    with pytest.raises(TypeError, match="as parameter 'weight'"):
        convert_to_float8_training(wrapped())
    by_step = get_peft_model(wrapped(fuse_on="step"), config).eval()
    expected = by_step(x())
    torch.testing.assert_close(exf.fuse(by_step.merge_and_unload())(x()), expected)
    convert_to_float8_training(wrapped(fuse_on="step"))


def test_lora_under_step_merges_at_any_time() -> None:
    model = get_peft_model(wrapped("dw", fuse_on="step"), LoraConfig(r=2, target_modules=["fc1"]))
    nn.init.ones_(model.base_model.model.blocks[0].fc1.lora_B["default"].weight)
    expected = model.eval()(x())
    merged = model.merge_and_unload()
    torch.testing.assert_close(exf.fuse(merged)(x()), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_whole_ffn_among_modules_to_save_trains_and_fuses(variant: str) -> None:
    model = adapted(variant, target_modules=["stem"], modules_to_save=["blocks.0"])
    expected = model(x())
    merged = model.merge_and_unload()
    torch.testing.assert_close(exf.fuse(merged)(x()), expected)


def test_one_linear_among_modules_to_save_is_refused_with_the_reason() -> None:
    config = LoraConfig(r=2, target_modules=["stem"], modules_to_save=["fc1"])
    model = get_peft_model(wrapped("mb"), config)
    with pytest.raises(RuntimeError, match=r"or replaced after wrap\(\)"):
        model(x())
    merged = adapted("sw", target_modules=["stem"], modules_to_save=["fc1"]).merge_and_unload()
    with pytest.raises(ValueError, match="replaced after wrap.*, as by modules_to_save of peft"):
        exf.fuse(merged)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_replaced_linear_is_named_and_the_ways_out_work(variant: str) -> None:
    model = wrapped(variant).eval()
    before = model.blocks[0].fc1
    model.blocks[0].fc1 = nn.Linear(4, 6)
    with pytest.raises(ValueError, match=r"If a linear was replaced after wrap\(\)"):
        exf.fuse(model)
    dense = FFNs()
    dense.load_state_dict(exf.fused_state_dict(model))
    torch.testing.assert_close(dense(x()), model(x()))
    model.blocks[0].fc1 = before
    exf.fuse(model)


def test_a_forward_that_was_patched_before_wrap_is_refused_where_a_router_needs_the_input() -> None:
    def patched() -> FFNs:
        model = FFNs()
        linear = model.blocks[0].fc1
        forward = linear.forward
        linear.forward = lambda x: 2 * forward(x)
        return model

    with pytest.raises(ValueError, match="blocks.0.fc1: is given a forward of their own"):
        wrapped("mb", patched())
    model = wrapped("dw", patched())
    expected = model(x())
    torch.testing.assert_close(exf.fuse(model)(x()), expected)
    wrapped("mb", patched(), fuse_on="step")(x()).sum().backward()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_pruning_a_wrapped_linear_is_refused_and_works_after_fuse(name: str) -> None:
    model = wrapped()
    expected = model.eval()(x())
    with pytest.raises(TypeError, match=rf"'{name}_orig' cannot be .* Call fuse\(model\) first"):
        prune.random_unstructured(model.blocks[0].fc1, name, 0.5)
    torch.testing.assert_close(model(x()), expected)
    prune.random_unstructured(exf.fuse(model).blocks[0].fc1, name, 0.5)


@pytest.mark.filterwarnings("ignore")
def test_quantizing_a_wrapped_model_is_refused_and_works_after_fuse() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = wrapped(model=nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
    expected = model.eval()(x())
    with pytest.raises(ValueError, match=r"Call fuse\(model\) before quantizing"):
        quantize_(model, Int8WeightOnlyConfig())
    assert torch.equal(model(x()), expected)
    quantize_(exf.fuse(model), Int8WeightOnlyConfig())
    torch.testing.assert_close(model(x()), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_offloaded_model_evaluates_and_fuses_once_it_is_back(variant: str) -> None:
    model = wrapped(variant).eval()
    expected = model(x())
    cpu_offload(model, execution_device=CPU)
    assert torch.equal(model(x()), expected)
    with pytest.raises(ValueError, match=r"offloaded by accelerate. Call .*remove_hook_from_mod"):
        exf.fuse(model)
    if variant == "mb":
        with pytest.raises(RuntimeError, match=r"offloading is for inference: call model.eval"):
            model.train()(x())
    remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(exf.fuse(model.eval())(x()), expected)


def test_an_offloaded_model_is_not_wrapped() -> None:
    model = cpu_offload(FFNs(), execution_device=CPU)
    with pytest.raises(ValueError, match="are offloaded by accelerate. Wrap first, offload after"):
        exf.wrap(FFNs() if model is None else model)
