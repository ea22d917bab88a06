"""A model from the meta device, `fuse_on="forward"`: filled, or an error at its first use."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import exfusion_param as exf
from exfusion_param import meo
from exfusion_testing.models import FFNs, inputs

VARIANTS = ["sw", "dw", "mb"]
UNFILLED = r"The experts of the weight of shape \(6, 4\) in 'blocks.0' hold what to_empty\(\) left"


def emptied(variant: str = "mb") -> Any:
    with torch.device("meta"):
        model = exf.wrap(FFNs(), variant=variant, bank_init="uniform", seed=0)
    return model.to_empty(device="cpu")


def real(variant: str = "mb") -> Any:
    return exf.wrap(FFNs(), variant=variant, bank_init="uniform", seed=0)


def x() -> Tensor:
    return inputs().float()


def without_fused(model: nn.Module) -> None:
    """Fill what is not wrapped, as a user's `init_weights` does."""
    model.stem.reset_parameters()
    model.head.reset_parameters()


USES: list[Callable[[Any], Any]] = [
    lambda model: model(x()),
    lambda model: model.eval()(x()),
    lambda model: copy.deepcopy(model)(x()),
    exf.fuse,
    exf.fused_state_dict,
    lambda model: model.blocks[0].fc1.weight,
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("use", range(len(USES)))
def test_what_nothing_has_filled_is_named_at_its_first_use(variant: str, use: int) -> None:
    model = emptied(variant)
    without_fused(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=UNFILLED):
            USES[use](model)


def test_a_first_linear_that_is_filled_leaves_the_next_one_to_be_named() -> None:
    model = emptied()
    without_fused(model)
    model.blocks[0].fc1.reset_parameters()
    with pytest.raises(RuntimeError, match=r"weight of shape \(4, 6\) in 'blocks.0'"):
        model(x())


def write(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)


def write_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.uniform_(-1, 1)


def reset(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def load_in_place(model: Any) -> None:
    model.load_state_dict(like(model).state_dict())


def load_assigned(model: Any) -> None:
    model.load_state_dict(like(model).state_dict(), assign=True)


def like(model: Any) -> Any:
    return real(model.blocks[0].fc1.parametrizations.weight[0].fusion_weights.config.variant)


def load_dense(model: Any) -> None:
    exf.load_dense_state_dict(model, FFNs().state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "fill", [write, write_data, reset, load_in_place, load_assigned, load_dense]
)
def test_a_model_that_is_filled_trains_and_fuses(variant: str, fill: Any) -> None:
    model = emptied(variant)
    fill(model)
    assert model(x()).isfinite().all()
    copy.deepcopy(model)(x())
    exf.fuse(model)(x())


def test_assigning_weights_fills_the_experts() -> None:
    model = emptied("sw")
    without_fused(model)
    for block in model.blocks:
        block.fc1.weight, block.fc1.bias = torch.randn(6, 4), torch.randn(6)
        block.fc2.weight, block.fc2.bias = torch.randn(4, 6), torch.randn(4)
    assert model(x()).isfinite().all()


@pytest.mark.parametrize("variant", ["dw", "mb"])
def test_fusion_weights_start_as_wrap_makes_them_on_a_device(variant: str) -> None:
    with pytest.warns(UserWarning, match=r"expert stacks that nothing has filled"):
        empty, full = emptied(variant).state_dict(), real(variant).state_dict()
    names = [name for name in full if "fusion_weights" in name]
    assert names
    for name in names:
        assert torch.equal(empty[name], full[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_that_had_memory_is_emptied_alike(variant: str) -> None:
    model, full = real(variant), real(variant).state_dict()
    model.to_empty(device="cpu")
    without_fused(model)
    with pytest.raises(RuntimeError, match=UNFILLED):
        model(x())
    own = [name for name in full if "fusion_weights" in name]
    kept = model.state_dict(keep_vars=True)
    assert all(torch.equal(kept[name], full[name]) for name in own)
    reset(model)
    assert model(x()).isfinite().all()


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_gates_for_each_sample_do_not_compute_with_unfilled_experts(level: Any) -> None:
    with torch.device("meta"):
        model = meo.wrap(FFNs(), level=level, causal=False, batch_dim=0)
    model.to_empty(device="cpu")
    without_fused(model)
    with pytest.raises(RuntimeError, match="blocks.0.fc1' hold what to_empty"):
        model(x())


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_unfilled_model_is_printed(variant: str) -> None:
    with torch.device("meta"):
        model = exf.wrap(FFNs(), variant=variant)
    text = repr(model)
    assert "bias=True" in text
    assert repr(model.to_empty(device="cpu")) == text


@pytest.fixture
def _two_ranks() -> Any:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_two_ranks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sharded_model_is_printed_and_its_weights_are_read(variant: str, dtype: Any) -> None:
    model = exf.wrap(FFNs().to(dtype), variant=variant, bank_init="uniform")
    exf.fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    assert "blocks" in repr(model)
    weight = model.blocks[0].fc1.weight
    assert isinstance(weight, DTensor)
    assert weight.dtype == dtype
    assert weight.shape == (6, 4)
    assert weight.grad_fn is not None
    with torch.no_grad():
        model.blocks[0].fc1.weight.to_local().zero_()
    with pytest.raises(RuntimeError, match="in-place write to the weight"):
        exf.fused_state_dict(model)


@pytest.mark.usefixtures("_two_ranks")
def test_a_sharded_model_from_the_meta_device_is_refused_until_it_is_filled() -> None:
    with torch.device("meta"):
        model = exf.wrap(FFNs(), bank_init="uniform")
    exf.fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match=UNFILLED):
        exf.fused_state_dict(model)
    for block in model.blocks:
        block.fc1.reset_parameters()
        block.fc2.reset_parameters()
    exf.fused_state_dict(model)
