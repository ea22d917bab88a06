"""Bad input: a clear error that names the linears and the way out, and the model as it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import exfusion_param as exf
from exfusion_testing.models import FFNs, inputs


def tied() -> nn.Module:
    model = FFNs()
    model.blocks[1].fc1.weight = model.blocks[0].fc1.weight
    return model


def tied_to_something_else() -> nn.Module:
    model = FFNs(dim=4, hidden=4)
    model.stem.weight = model.blocks[0].fc2.weight
    return model


def frozen() -> nn.Module:
    model = FFNs()
    model.blocks[0].requires_grad_(False)
    return model


def quantised() -> nn.Module:
    model = FFNs()
    linear = model.blocks[0].fc1
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    return model


def normalised() -> nn.Module:
    model = FFNs()
    parametrizations.weight_norm(model.blocks[0].fc1)
    return model


def lazy() -> nn.Module:
    model = FFNs()
    model.blocks[0].fc1 = nn.LazyLinear(6)
    return model


def with_lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(FFNs(), LoraConfig(target_modules=["fc1"], r=2))


def converted() -> nn.Module:
    from torch.testing._internal.two_tensor import TwoTensor

    model = FFNs()
    linear = model.blocks[0].fc1
    linear.weight = nn.Parameter(TwoTensor(linear.weight.data, linear.weight.data))
    return model


def with_its_weight_computed(edit: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = FFNs()
        edit(model.blocks[0].fc1)
        return model

    return make


def without_ffn() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 5))


def in_data_parallel() -> nn.Module:
    return nn.DataParallel(FFNs())


REFUSED: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (tied, {}, r"blocks.0.fc1.weight is tied to blocks.1.fc1.weight: .* Untie them"),
    (tied_to_something_else, {}, "stem.weight is tied to blocks.0.fc2.weight"),
    (frozen, {}, r"blocks.0.fc1, blocks.0.fc2: are frozen. Set requires_grad"),
    (quantised, {}, "blocks.0.fc1: is not of a floating dtype"),
    (normalised, {}, "blocks.0.fc1: is parametrized by something else"),
    *(
        (with_its_weight_computed(edit), {}, f"weight parameter.* or norms first,.*{way_out}")
        for edit, way_out in (
            (lambda linear: prune.l1_unstructured(linear, "weight", 0.5), "prune.remove"),
            (spectral_norm, "remove_spectral_norm"),
        )
    ),
    (with_lora, {}, r"fc1: are inside an adapter \(peft\). Merge it first"),
    (converted, {}, "blocks.0.fc1: is converted to a tensor subclass"),
    (lazy, {}, r"blocks.0.fc1 is lazy, without a shape yet. Run a forward before wrap\(\)"),
    (lambda: exf.wrap(FFNs()), {}, r"already wrapped. Call fuse\(model\) first"),
    (
        without_ffn,
        {},
        r"No FFN was found in Sequential. Its linears are: 0, 2. .*filter_fn=\['\*'\]\)",
    ),
    (
        FFNs,
        {"filter_fn": ["*.fc1", "*.w1"]},
        r"The glob '\*.w1' matches no linear. .*blocks.\*.fc1",
    ),
    (FFNs, {"filter_fn": lambda module, fqn: False}, "filter_fn accepts no linear in FFNs"),
    (FFNs, {"filter_fn": []}, "filter_fn accepts no linear in FFNs"),
    (FFNs, {"layers": (2,)}, "layers names FFN group 2; the model has 2"),
    (FFNs, {"layers": (-3,)}, "layers names FFN group -3; the model has 2"),
    (in_data_parallel, {}, r"inside DataParallel already, .* Call wrap\(model\) first"),
    (FFNs, {"seed": 1, "generator": torch.Generator()}, "seed and generator are both given"),
    (
        lambda: nn.TransformerEncoderLayer(4, 2, 8),
        {"filter_fn": ["self_attn.out_proj"]},
        'self_attn.out_proj: is read without being called, .* variant="sw"',
    ),
]


@pytest.mark.parametrize(("make", "arguments", "message"), REFUSED)
def test_wrap_refuses_and_leaves_the_model_as_it_was(
    make: Callable[[], nn.Module], arguments: dict[str, Any], message: str
) -> None:
    model = make()
    classes = [type(module) for module in model.modules()]
    before = [(name, id(tensor), tensor.requires_grad) for name, tensor in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        exf.wrap(model, **arguments)
    assert [type(module) for module in model.modules()] == classes
    after = [(name, id(tensor), tensor.requires_grad) for name, tensor in model.named_parameters()]
    assert after == before


@pytest.mark.parametrize(("make", "arguments", "message"), REFUSED[:14])
def test_a_dry_run_refuses_what_wrap_refuses(
    make: Callable[[], nn.Module], arguments: dict[str, Any], message: str
) -> None:
    model = make()
    if not any("parametrizations" in name for name, _ in model.named_modules()):
        with pytest.raises(ValueError, match=message):
            exf.summarize(model, **arguments)


def test_wrap_names_what_is_no_config() -> None:
    with pytest.raises(TypeError, match="config must be an ExFusionConfig or None, got dict"):
        exf.wrap(FFNs(), {"num_experts": 4})
    with pytest.raises(TypeError, match="ExFusionConfig has no field experts"):
        exf.wrap(FFNs(), experts=4)


def test_arguments_of_the_wrong_kind_are_named() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got NoneType"):
        exf.wrap(None)
    with pytest.raises(TypeError, match="filter_fn must be a function or globs, got 5"):
        exf.wrap(FFNs(), filter_fn=5)
    with torch.inference_mode(), pytest.raises(ValueError, match="outside of inference_mode"):
        exf.wrap(FFNs())


def test_running_out_of_memory_leaves_the_model_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = FFNs(), []

    def fail_at_last(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 8:  # weights and biases of two FFNs
            raise torch.OutOfMemoryError("no memory left")
        return torch.empty(4, *args[0].shape)

    monkeypatch.setattr("exfusion_param.tensors.expert_starts.independent_experts", fail_at_last)
    with pytest.raises(torch.OutOfMemoryError):
        exf.wrap(model)
    assert len(calls) == 8
    assert all(type(block.fc1) is nn.Linear for block in model.blocks)


def test_fuse_refuses_a_dense_model() -> None:
    with pytest.raises(ValueError, match="FFNs has no wrapped linear, so nothing to fuse"):
        exf.fuse(FFNs())
    with pytest.raises(ValueError, match="FFNs has no wrapped linear to measure"):
        exf.metrics(FFNs())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["experts", "fusion weights"])
def test_fuse_refuses_non_finite_values_and_stays_wrapped(value: float, where: str) -> None:
    model = exf.wrap(FFNs(), variant="dw")
    with torch.no_grad():
        if where == "experts":
            model.blocks[1].fc2.parametrizations.bias.original[0, 0] = value
        else:
            model.blocks[1].fc1.parametrizations.weight[0].fusion_weights.weights[0] = value
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="blocks.1.fc.*: the experts .* hold NaN or inf"):
        exf.fuse(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7), state[name].nan_to_num(7))


def test_a_weight_cannot_be_assigned_under_fusion_weights_that_sum_to_zero() -> None:
    linear = exf.wrap(FFNs(), variant="dw").blocks[0].fc1
    before = linear.parametrizations.weight.original.detach().clone()
    with torch.no_grad():
        linear.parametrizations.weight[0].fusion_weights.weights.zero_()
    with pytest.raises(ValueError, match="fusion weights sum to zero"):
        linear.weight = torch.ones(6, 4)
    assert torch.equal(linear.parametrizations.weight.original, before)


def test_fuse_refuses_a_part_of_a_group() -> None:
    model = exf.wrap(FFNs(), bank_init="uniform")
    with pytest.raises(ValueError, match="Fuse a module that holds all of 'blocks.0'"):
        exf.fuse(model.blocks[0].fc1)
    model(inputs().float())


def test_sharded_linears_are_refused_by_wrap_and_fuse() -> None:
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))

        def shard(parameter: torch.Tensor) -> nn.Parameter:
            return nn.Parameter(DTensor.from_local(parameter.data, mesh, [Replicate()]))

        model = FFNs()
        model.blocks[0].fc1.weight = shard(model.blocks[0].fc1.weight)
        with pytest.raises(ValueError, match=r"blocks.0.fc1: is sharded \(DTensor\). Wrap first"):
            exf.wrap(model)

        model = exf.wrap(FFNs(), bank_init="uniform")
        stacks = model.blocks[0].fc1.parametrizations.weight
        stacks.original = shard(stacks.original)
        with pytest.raises(ValueError, match=r"sharded \(DTensor\). Take fused_state_dict"):
            exf.fuse(model)
    finally:
        torch.distributed.destroy_process_group()
