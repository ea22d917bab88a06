"""Code that edits a wrapped linear: norms on its weight, deletion, quantization, partial loads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import exfusion_param as exf
from exfusion_testing.models import FFNs, inputs, loss_of

VARIANTS = ["sw", "dw", "mb"]
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:.*torch.ao.quantization")


def wrapped(variant: str = "mb", **settings: Any) -> Any:
    torch.manual_seed(0)
    return exf.wrap(FFNs(), variant=variant, bank_init="uniform", seed=0, **settings)


def x() -> Tensor:
    return inputs().float()


def train(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loss_of(model, x()).backward()
    optimizer.step()


def unregister(linear: nn.Module) -> None:
    parametrize.remove_parametrizations(linear, "weight")


Edit = Callable[[Any], Any]
NORMS: dict[str, tuple[Edit, Edit]] = {
    "weight_norm": (parametrizations.weight_norm, unregister),
    "spectral_norm": (parametrizations.spectral_norm, unregister),
    "orthogonal": (parametrizations.orthogonal, unregister),
    "old weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "old spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "pruning": (
        lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
        lambda linear: prune.remove(linear, "weight"),
    ),
}
TAKEN = r"'blocks.0.fc1.weight' is not a parameter of its linear any more: .* fuse\(model\)"


@pytest.mark.parametrize("use", [train, exf.fuse, exf.fused_state_dict])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_norm_takes_no_weight_from_its_experts_on_step(
    variant: str, norm: str, use: Callable[[Any], Any]
) -> None:
    model = wrapped(variant, fuse_on="step")
    apply, undo = NORMS[norm]
    apply(model.blocks[0].fc1)
    model(x())
    with pytest.raises(RuntimeError, match=TAKEN):
        use(model)
    undo(model.blocks[0].fc1)
    train(model)
    expected = model.eval()(x())
    torch.testing.assert_close(exf.fuse(model)(x()), expected)
    apply(model.blocks[0].fc1)


@pytest.mark.parametrize("norm", ["old weight_norm", "old spectral_norm"])
def test_a_norm_that_takes_the_weight_out_is_refused_at_once_on_forward(norm: str) -> None:
    model = wrapped()
    expected = model.eval()(x())
    with pytest.raises(KeyError, match=r"weight.* is not a parameter .* Call fuse\(model\) first"):
        NORMS[norm][0](model.blocks[0].fc1)
    torch.testing.assert_close(model(x()), expected)
    NORMS[norm][0](exf.fuse(model).blocks[0].fc1)
    assert type(model.blocks[1].fc1._parameters) is dict
    model(x())


@pytest.mark.parametrize("norm", ["weight_norm", "orthogonal"])
@pytest.mark.parametrize("use", [lambda m: m(x()), exf.fuse, exf.fused_state_dict])
def test_a_norm_on_top_of_experts_that_needs_more_than_their_sum(norm: str, use: Any) -> None:
    model = wrapped()
    NORMS[norm][0](model.blocks[0].fc1)
    with pytest.raises(RuntimeError, match=r"was registered on the weight .* Call fuse\(model\)"):
        use(model)
    NORMS[norm][0](exf.fuse(wrapped()).blocks[0].fc1)


def test_spectral_norm_on_top_of_experts_is_that_of_their_sum() -> None:
    model = wrapped("dw").eval()
    weight = model.blocks[0].fc1.weight.detach()
    parametrizations.spectral_norm(model.blocks[0].fc1, n_power_iterations=50)
    fused = exf.fuse(model.train()).eval().blocks[0].fc1.weight
    torch.testing.assert_close(fused, weight / torch.linalg.matrix_norm(weight, 2))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_fused_tensor_is_not_deleted(name: str) -> None:
    linear = wrapped().blocks[0].fc1
    with pytest.raises(AttributeError, match=rf"'{name}' is not a parameter of the wrapped linear"):
        delattr(linear, name)
    with pytest.raises(KeyError, match=r"not a parameter of the wrapped linear"):
        del linear._parameters[name]
    with pytest.raises(KeyError, match=r"^'other'$"):
        linear._parameters["other"]
    assert linear(torch.ones(4)).shape == (6,)


def test_eager_quantization_is_refused_and_works_after_fuse() -> None:
    quantize = torch.ao.quantization.quantize_dynamic
    model = wrapped().eval()
    with pytest.raises(TypeError, match=r"cannot be quantized: .* Call fuse\(model\) first"):
        quantize(model, {nn.Linear})
    quantize(model, {nn.Conv1d})(x())  # which chooses none of ours
    quantize(exf.fuse(model), {nn.Linear})(x())
    quantize(wrapped(fuse_on="step").eval(), {nn.Linear})(x())


@pytest.mark.parametrize("part", ["blocks", "blocks.0", "blocks.0.fc1"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_part_of_a_model_refuses_the_dense_checkpoint_of_that_part(
    variant: str, strict: bool, part: str
) -> None:
    model, dense = wrapped(variant), FFNs()
    module = model.get_submodule(part)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = dense.get_submodule(part).state_dict()
    with pytest.raises(ValueError, match=r"weight is dense, .*load_dense_state_dict\(model"):
        module.load_state_dict(state, strict=strict)
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    module.load_state_dict(before, strict=strict)
    exf.load_dense_state_dict(module, state)
    torch.testing.assert_close(model.blocks[0].fc1.weight, dense.blocks[0].fc1.weight)
    loaded = exf.fuse(model).blocks[0].fc1
    loaded.load_state_dict(dense.blocks[0].fc1.state_dict())


def test_a_fused_bias_is_not_set_to_none_and_is_before_and_after() -> None:
    model = wrapped()
    with pytest.raises(TypeError, match=r"'bias' cannot be None .* before wrap\(\), or after fuse"):
        model.blocks[0].fc1.bias = None
    train(model)
    linear = exf.fuse(model).blocks[0].fc1
    linear.bias = None
    train(exf.wrap(model))


@pytest.mark.parametrize("use", [lambda m: m(x()), exf.metrics, exf.fuse])
def test_a_weight_that_is_taken_from_its_experts_without_its_bias_is_named(use: Any) -> None:
    model = wrapped()
    expected = model.eval()(x())
    linear = model.blocks[0].fc1
    parametrize.remove_parametrizations(linear, "weight")
    with pytest.raises(RuntimeError, match=r"its bias is still fused.* weight and bias of all"):
        use(model)
    parametrize.remove_parametrizations(linear, "bias")
    for name in ("weight", "bias"):
        parametrize.remove_parametrizations(model.blocks[0].fc2, name)
    torch.testing.assert_close(model(x()), expected)
    torch.testing.assert_close(exf.fuse(model)(x()), expected)
    assert type(linear) is type(model.blocks[1].fc2) is nn.Linear


def without(*parts: str) -> Callable[[Any], dict[str, Tensor]]:
    def state(model: Any) -> dict[str, Tensor]:
        state: dict[str, Tensor] = model.state_dict()
        return {name: state[name] for name in state if not name.endswith(parts)}

    return state


@pytest.mark.parametrize(
    ("source", "target", "state"),
    [
        ("mb", "mb", lambda model: dict(model.named_parameters())),  # the bank is a buffer
        ("mb", "mb", without("bank", "router")),
        ("dw", "dw", without("weights")),
        *((a, b, without()) for a in VARIANTS for b in VARIANTS if a != b),
    ],
)
@pytest.mark.parametrize("part", ["", "blocks.0", "blocks.0.fc1"])
def test_experts_that_load_without_their_fusion_weights_warn(
    source: str, target: str, state: Callable[[Any], Any], part: str
) -> None:
    saved, model = wrapped(source).get_submodule(part), wrapped(target).get_submodule(part)
    with pytest.warns(UserWarning, match="it fuses to other weights than the ones that were saved"):
        model.load_state_dict(state(saved), strict=False)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_states_and_parts_without_experts_load_without_a_warning(
    variant: str, strict: bool
) -> None:
    saved, model = wrapped(variant), wrapped(variant)
    train(saved)
    model.load_state_dict(saved.state_dict(), strict=strict)
    torch.testing.assert_close(model.eval()(x()), saved.eval()(x()))
    model.load_state_dict({"stem.bias": torch.ones(4)}, strict=False)
    model.load_state_dict(without("original")(saved), strict=False)
