"""A wrapped linear used as a linear: assigned to, initialised again, copied, pickled."""

import copy
import pickle
from unittest import mock

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import exfusion_param as exf
from exfusion_testing.models import FFNs, inputs, loss_of

VARIANTS = ["sw", "dw", "mb"]


def wrapped(variant: str = "mb") -> FFNs:
    return exf.wrap(FFNs(), variant=variant, bank_init="uniform", seed=0)


def train(model: nn.Module, steps: int = 2, seed: int = 0) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, inputs(seed=seed + step).float()).backward()
        optimizer.step()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_weight_can_be_assigned(variant: str) -> None:
    model = wrapped(variant)
    train(model)
    linear = model.blocks[0].fc1
    weight, bias = torch.randn(6, 4), torch.randn(6)
    linear.weight, linear.bias = weight, bias
    model.eval()
    torch.testing.assert_close(linear.weight, weight)
    torch.testing.assert_close(linear.bias, bias)
    stack = linear.parametrizations.weight.original
    assert not torch.equal(stack[0], stack[1])  # exact copies would never separate
    train(model)


def test_a_weight_assigned_under_a_bank_of_zeros_shows_once_the_bank_is_full() -> None:
    model = exf.wrap(FFNs(), momentum=0.0)
    linear, weight = model.blocks[0].fc1, torch.randn(6, 4)
    with pytest.warns(UserWarning, match="bank"):
        linear.weight = weight
    assert not linear.weight.any()
    linear.parametrizations.weight[0].fusion_weights.bank.fill_(0.25)
    torch.testing.assert_close(linear.weight, weight)


@pytest.mark.parametrize("bias", [True, False])
def test_reset_parameters_draws_every_expert_like_the_dense_class(bias: bool) -> None:
    model = exf.wrap(FFNs(dim=50, hidden=100, bias=bias), variant="sw")
    linear = model.blocks[0].fc1
    stacks = [fusions.original for fusions in linear.parametrizations.values()]
    with torch.no_grad():
        for stack in stacks:
            stack.fill_(7)
    linear.reset_parameters()
    bound = 50**-0.5  # of nn.Linear's uniform distribution
    for stack in stacks:
        assert stack.abs().max() <= bound
        assert stack.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not torch.equal(stack[0], stack[1])
    assert linear.parametrizations.weight.original is stacks[0]


def test_a_deepcopy_is_independent() -> None:
    model = wrapped()
    train(model)
    replica = copy.deepcopy(model)
    x = inputs(seed=5).float()
    assert torch.equal(replica(x), model(x))
    before = {name: value.clone() for name, value in replica.state_dict().items()}
    train(model, seed=7)
    for name, value in replica.state_dict().items():
        assert torch.equal(value, before[name]), name
    train(replica, seed=7)
    assert torch.equal(replica(x), model(x))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("copied_is_fused", [True, False])
def test_fusing_a_copy_or_the_original_leaves_the_other_training(
    variant: str, copied_is_fused: bool
) -> None:
    model = wrapped(variant)
    replica = copy.deepcopy(copy.deepcopy(model))
    fused, training = (replica, model) if copied_is_fused else (model, replica)
    exf.fuse(fused)
    train(training)
    exf.fuse(training)
    assert type(training.blocks[0].fc1) is type(fused.blocks[0].fc1) is nn.Linear


def test_torchs_own_removal_on_a_copy_leaves_the_original_intact() -> None:
    model = wrapped()
    replica = copy.deepcopy(model)
    for name in ("weight", "bias"):
        parametrize.remove_parametrizations(replica.blocks[0].fc1, name)
    train(model)


def test_a_copy_of_a_single_linear_fuses() -> None:
    linear = copy.deepcopy(wrapped("dw").blocks[0].fc2)
    weight = linear.weight
    for name in ("weight", "bias"):
        parametrize.remove_parametrizations(linear, name)
    assert torch.equal(linear.weight, weight)


@pytest.mark.parametrize("variant", VARIANTS)
def test_timms_ema_follows_and_fuses_while_the_original_trains_on(variant: str) -> None:
    model = wrapped(variant)
    ema = ModelEmaV3(model, decay=0.5)
    for _ in range(3):
        train(model)
        ema.update(model)
    average = ema.module.state_dict()
    assert any(not torch.equal(value, average[k]) for k, value in model.state_dict().items())
    shipped = exf.fuse(copy.deepcopy(ema.module))
    x = inputs().float()
    torch.testing.assert_close(shipped.eval()(x), ema.module.eval()(x))
    exf.fuse(ema.module)
    train(model)


@pytest.mark.parametrize("use_buffers", [True, False])
def test_torchs_averaged_model_follows_and_fuses(use_buffers: bool) -> None:
    model = wrapped()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    for _ in range(3):
        train(model)
        averaged.update_parameters(model)
    exf.fuse(averaged.module)
    assert type(averaged.module.blocks[0].fc1) is nn.Linear
    train(model)


def test_pickling_says_to_use_the_state_dict() -> None:
    with pytest.raises(RuntimeError, match=r"only supported through state_dict\(\)"):
        pickle.dumps(wrapped())
    pickle.dumps(exf.fuse(wrapped()))


def test_isinstance_holds_while_wrapped_and_the_exact_type_after() -> None:
    model = wrapped()
    assert isinstance(model.blocks[0].fc1, nn.Linear)
    assert type(model.blocks[0].fc1) is not nn.Linear
    assert type(exf.fuse(model).blocks[0].fc1) is nn.Linear


def test_torchs_parametrization_cache_has_no_effect() -> None:
    model, x = wrapped("sw"), inputs().float()
    plain = model(x)
    with parametrize.cached():
        for _ in range(2):  # a cached weight would break the second backward
            loss_of(model, x).backward()
        assert torch.equal(model(x), plain)
    train(model)


def test_linears_of_one_kind_share_a_class_and_survive_each_others_end() -> None:
    """torch.compile then compiles equal blocks once."""
    first, second = wrapped().blocks
    assert type(first.fc1) is type(second.fc1)
    assert type(first.fc1) is not type(first.fc2)  # the router reads only the input of fc1
    for name in ("weight", "bias"):
        expected = second.fc1.get_parameter(f"parametrizations.{name}.original")
        parametrize.remove_parametrizations(first.fc1, name)
        assert isinstance(getattr(first.fc1, name), nn.Parameter)
        assert getattr(second.fc1, name).shape == expected.shape[1:]
    assert type(first.fc1) is nn.Linear


def test_a_patched_class_is_as_before_after_the_patch() -> None:
    linear = wrapped("dw").blocks[0].fc1
    with mock.patch.object(type(linear), "forward", lambda self, x: x):
        pass
    assert linear(torch.ones(1, 4)).shape == (1, 6)


def test_a_tensor_that_torch_parametrizes_after_wrap_is_the_one_linears_own() -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model = exf.wrap(nn.Sequential(Scaled(), Scaled()), variant="sw", filter_fn=["0", "1"])
    parametrize.register_parametrization(model[0], "scale", Doubled())
    assert torch.equal(model[0].scale, torch.full((4,), 2.0))
    assert isinstance(model[1].scale, nn.Parameter)
    model(torch.randn(2, 4)).sum().backward()
    exf.fuse(model)
    assert isinstance(model[0].weight, nn.Parameter)
    assert type(model[1]) is Scaled
    parametrize.remove_parametrizations(model[0], "scale")
    assert type(model[0]) is Scaled
