"""Dense checkpoints out of and into wrapped models."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import exfusion_param as exf
from exfusion_param import ExFusionConfig
from exfusion_param.checkpoint import describe
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.strategies import configs

VARIANTS = ["sw", "dw", "mb"]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@given(config=configs())
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.filterwarnings("ignore:The memory bank of")
def test_fused_state_dict_is_that_of_the_fused_model(config: ExFusionConfig, bias: bool) -> None:
    model = exf.wrap(FFNs(bias=bias), config)
    model(inputs().float())  # a training forward does not show
    before = snapshot(model)
    state = exf.fused_state_dict(model)
    assert_unchanged(model, before)
    assert list(state) == list(FFNs(bias=bias).state_dict())
    fused = exf.fuse(model).state_dict()
    assert list(state) == list(fused)
    assert all(torch.equal(state[name], fused[name]) for name in fused)
    assert not any(value.requires_grad for value in state.values())


def test_fused_state_dict_of_a_dense_model_is_its_own() -> None:
    model = FFNs()
    assert list(exf.fused_state_dict(model)) == list(model.state_dict())


def test_fused_state_dict_names_a_shared_module_as_often_as_the_dense_model_does() -> None:
    dense = FFNs(depth=1)
    dense.blocks.append(dense.blocks[0])
    keys = list(dense.state_dict())
    assert sum("fc1.weight" in key for key in keys) == 2
    model = exf.wrap(dense, variant="sw")
    assert list(exf.fused_state_dict(model)) == keys
    assert list(exf.fuse(model).state_dict()) == keys


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dense_checkpoint_loads_into_a_wrapped_model(variant: str) -> None:
    dense = FFNs()
    model = exf.wrap(FFNs(), variant=variant, bank_init="uniform", num_experts=3)
    missing, unexpected = exf.load_dense_state_dict(model, dense.state_dict())
    assert missing == unexpected == []
    x = inputs().float()
    torch.testing.assert_close(model.eval()(x), dense(x))
    stack = model.blocks[0].fc1.parametrizations.weight.original
    assert not torch.equal(stack[0], stack[1])
    for name, value in exf.fused_state_dict(model).items():
        torch.testing.assert_close(value, dense.state_dict()[name])


def test_loading_a_dense_checkpoint_resets_the_fusion_weights_of_a_trained_model() -> None:
    model = exf.wrap(FFNs(), variant="dw")
    weights = model.blocks[0].fc1.parametrizations.weight[0].fusion_weights.weights
    with torch.no_grad():
        weights.copy_(torch.tensor([3.0, -1.0, 0.0, 0.5]))
    exf.load_dense_state_dict(model, FFNs().state_dict())
    assert torch.equal(weights, torch.full((4,), 0.25))


def test_noise_of_a_dense_load_is_reproducible() -> None:
    dense, model = FFNs().state_dict(), exf.wrap(FFNs(), variant="sw")
    states = []
    for _ in range(2):
        exf.load_dense_state_dict(model, dense, generator=torch.Generator().manual_seed(1))
        states.append(snapshot(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"head.weight": None}, "missing keys: head.weight"),
    ({"blocks.0.fc1.bias": None}, "missing keys: blocks.0.fc1.bias"),
    ({"extra": torch.ones(1)}, "unexpected keys: extra"),
    ({"blocks.0.fc1.weight": torch.ones(2, 2)}, r"blocks.0.fc1.weight has shape \(2, 2\)"),
    ({"stem.bias": torch.ones(9)}, r"stem.bias has shape \(9,\), the model \(4,\)"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN)
def test_a_dense_checkpoint_that_does_not_fit_changes_nothing(
    changes: dict[str, Any], message: str
) -> None:
    state = FFNs().state_dict()
    for name, value in changes.items():
        state.pop(name, None)
        if value is not None:
            state[name] = value
    model = exf.wrap(FFNs(), bank_init="uniform")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        exf.load_dense_state_dict(model, state)
    assert_unchanged(model, before)


def test_without_strict_the_keys_that_did_not_fit_are_returned() -> None:
    dense = FFNs().state_dict()
    state = {"extra": torch.ones(1), **dense}
    del state["blocks.0.fc1.bias"], state["head.weight"]
    model = exf.wrap(FFNs(), variant="sw")
    keys = exf.load_dense_state_dict(model, state, strict=False)
    assert keys.missing_keys == ["blocks.0.fc1.bias", "head.weight"]
    assert keys.unexpected_keys == ["extra"]
    torch.testing.assert_close(model.blocks[0].fc1.weight, dense["blocks.0.fc1.weight"])


class InsideAnother(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_plain_loading_of_a_dense_checkpoint_says_what_to_call_and_changes_nothing(
    strict: bool, copied: bool, inside: bool
) -> None:
    model, state = exf.wrap(FFNs(), bank_init="uniform"), FFNs().state_dict()
    if copied:
        model = copy.deepcopy(model)
    if inside:
        model, state = InsideAnother(model), {f"model.{k}": v for k, v in state.items()}
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"blocks.0.fc1.weight is dense, .*load_dense_state_dict"):
        model.load_state_dict(state, strict=strict)
    assert_unchanged(model, before)


def test_another_number_of_experts_is_refused_and_changes_nothing() -> None:
    model = exf.wrap(FFNs(), num_experts=4, bank_init="uniform")
    state = exf.wrap(FFNs(), num_experts=8, bank_init="uniform").state_dict()
    before = snapshot(model)
    with pytest.raises(ValueError, match="has 8 experts, but the model has 4. .* num_experts=8"):
        model.load_state_dict(state)
    assert_unchanged(model, before)


def test_after_fuse_plain_loading_works_again() -> None:
    model = exf.fuse(exf.wrap(FFNs(), variant="sw"))
    model.load_state_dict(FFNs().state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_wrapped_checkpoint_survives_safetensors(variant: str, tmp_path: Any) -> None:
    model = exf.wrap(FFNs(), variant=variant, bank_init="uniform")
    state = model.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)  # nothing twice
    save_file(state, tmp_path / "model.safetensors")
    other = exf.wrap(FFNs(), variant=variant, bank_init="uniform")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = inputs().float()
    assert torch.equal(other(x), model(x))


@given(config=configs())
def test_training_resumes_exactly_from_a_checkpoint(config: ExFusionConfig) -> None:
    model = exf.wrap(FFNs(), config)
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.05), lr=0.01)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            for micro_batch in inputs(seed=step).float().chunk(2):
                (loss_of(model, micro_batch) / 2).backward()
            optimizer.step()

    train(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(3, 6))

    resumed = exf.wrap(FFNs(), config)
    stepper = torch.optim.AdamW(exf.param_groups(resumed, 0.05), lr=0.01)
    resumed.load_state_dict(saved[0])
    stepper.load_state_dict(saved[1])
    train(resumed, stepper, range(3, 6))
    assert_unchanged(resumed, model.state_dict())


def test_a_bank_of_zeros_warns_where_it_leaves_nothing_of_the_weights() -> None:
    model = exf.wrap(FFNs())
    with pytest.warns(UserWarning, match='2 FFN groups .* still zero, .* bank_init="uniform"'):
        exf.load_dense_state_dict(model, FFNs().state_dict())
    with pytest.warns(UserWarning, match="still zero"):
        exf.fused_state_dict(model)


def test_what_a_partial_checkpoint_does_not_speak_of_keeps_its_fused_value() -> None:
    model = exf.wrap(FFNs(), variant="dw")
    with torch.no_grad():
        weights = model.blocks[0].fc1.parametrizations.weight[0].fusion_weights.weights
        weights.copy_(torch.tensor([3.0, -1.0, 0.0, 0.5]))
    before = exf.fused_state_dict(model)
    given = {"blocks.0.fc1.weight": torch.randn(6, 4)}
    keys = exf.load_dense_state_dict(model, given, strict=False)
    assert set(keys.missing_keys) == set(before) - set(given)
    for name, value in exf.fused_state_dict(model).items():
        torch.testing.assert_close(value, given.get(name, before[name]))


def test_the_generator_of_a_dense_load_draws_the_routers_too() -> None:
    states = []
    for _ in range(2):
        model = exf.wrap(FFNs(), bank_init="uniform")
        generator = torch.Generator().manual_seed(1)
        exf.load_dense_state_dict(model, FFNs().state_dict(), generator=generator)
        states.append({k: v for k, v in model.state_dict().items() if "router" in k})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_stack_of_biases_of_another_number_is_refused_too() -> None:
    model = exf.wrap(FFNs(), variant="sw")
    state = {
        name: torch.cat([value, value]) if name.endswith("bias.original") else value
        for name, value in model.state_dict().items()
    }
    before = snapshot(model)
    with pytest.raises(ValueError, match="bias.original has 8 experts, but the model has 4"):
        model.load_state_dict(state)
    assert_unchanged(model, before)


def test_a_model_of_which_a_part_was_fused_or_replaced_loads_its_own_checkpoint() -> None:
    model = exf.wrap(FFNs(), variant="sw")
    exf.fuse(model.blocks[0])
    model.load_state_dict(model.state_dict())
    model.blocks[1] = FFNs().blocks[1]
    model.load_state_dict(model.state_dict())


def test_blocks_that_were_taken_out_after_wrap_are_not_asked_for() -> None:
    model = exf.wrap(FFNs())
    model.blocks = model.blocks[:1]
    model.load_state_dict(model.state_dict())


def test_stacks_under_other_names_are_refused_and_parts_are_not() -> None:
    model = exf.wrap(FFNs())
    state = model.state_dict()
    model.load_state_dict({"stem.bias": state["stem.bias"]}, strict=False)
    renamed = {name.replace("blocks", "layers"): value for name, value in state.items()}
    with pytest.raises(ValueError, match="a stack layers.0.fc1.* saved under other names"):
        model.load_state_dict(renamed, strict=False)


@pytest.mark.parametrize("outer", ["module.", "_orig_mod.", "module._orig_mod."])
def test_the_line_that_renames_a_state_dict_of_an_outer_module_works(outer: str) -> None:
    model = exf.wrap(FFNs(), seed=0)
    state_dict = {outer + name: value for name, value in exf.wrap(FFNs()).state_dict().items()}
    with pytest.raises(ValueError, match="saved under other names. Load {") as caught:
        model.load_state_dict(state_dict)
    line = str(caught.value).partition("Load ")[2].rstrip(".")
    renamed = eval(line, {"state_dict": state_dict})
    model.load_state_dict(renamed)
    assert_unchanged(model, renamed)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("strict", [True, False])
def test_experts_of_forward_are_refused_under_step_and_the_way_out_works(
    variant: str, strict: bool
) -> None:
    settings: dict[str, Any] = {"variant": variant, "bank_init": "uniform"}
    trained = exf.wrap(FFNs(), **settings)
    model = exf.wrap(FFNs(), fuse_on="step", **settings)
    before = snapshot(model)
    with pytest.raises(ValueError, match="with load_dense_state_dict"):
        model.load_state_dict(trained.state_dict(), strict=strict)
    with pytest.raises(ValueError, match="with load_dense_state_dict"):
        model.blocks[0].fc1.load_state_dict(trained.blocks[0].fc1.state_dict(), strict=strict)
    assert_unchanged(model, before)
    exf.load_dense_state_dict(model, exf.fused_state_dict(trained))
    x = inputs().float()
    torch.testing.assert_close(model.eval()(x), trained.eval()(x))
    state = exf.fuse(model).state_dict()
    model.load_state_dict(state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_dict_of_step_loads_under_forward_as_the_message_says(variant: str) -> None:
    settings: dict[str, Any] = {"variant": variant, "bank_init": "uniform"}
    trained = exf.wrap(FFNs(), fuse_on="step", **settings)
    model = exf.wrap(FFNs(), **settings)
    with pytest.raises(ValueError, match=r"is dense.*load_dense_state_dict\(model, state_dict"):
        model.load_state_dict(trained.state_dict())
    assert exf.load_dense_state_dict(model, trained.state_dict()) == ([], [])
    x = inputs().float()
    torch.testing.assert_close(model.eval()(x), trained.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fuse_on", ["forward", "step"])
def test_checkpoint_wrapper_leaves_no_trace_in_names(fuse_on: str) -> None:
    plain = exf.wrap(FFNs(), variant="mb", fuse_on=fuse_on, bank_init="uniform", seed=0)
    model = copy.deepcopy(plain)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block)
    ours, theirs = exf.fused_state_dict(model), exf.fused_state_dict(plain)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert exf.metrics(model) == exf.metrics(plain)
    assert describe(model) == describe(plain)
    dense = FFNs().state_dict()
    for each in (model, plain):
        exf.load_dense_state_dict(each, dense, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(v, plain.state_dict()[n]) for n, v in model.state_dict().items())
