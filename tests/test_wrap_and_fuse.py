"""`wrap` and `fuse` are inverse but for the training in between."""

import copy
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from torch import nn
from torch.nn.utils import parametrize

import exfusion_param as exf
from exfusion_param import ExFusionConfig
from exfusion_testing.models import FFNs, inputs
from exfusion_testing.strategies import configs, hidden_sizes, sizes

pytestmark = pytest.mark.filterwarnings("ignore:The memory bank of")


def deit_tiny() -> nn.Module:
    return timm.create_model("deit_tiny_patch16_224")


def shape_of(model: nn.Module) -> dict[str, Any]:
    """Everything that `fuse` has to give back, but for the values."""
    return {
        "classes": [(name, type(module)) for name, module in model.named_modules()],
        "state": [(k, v.shape, v.dtype) for k, v in model.state_dict().items()],
        "parameters": [(k, p.shape, p.dtype, p.requires_grad) for k, p in model.named_parameters()],
        "buffers": [name for name, _ in model.named_buffers()],
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "hooks": [
            (name, {key: len(value) for key, value in vars(module).items() if "hooks" in key})
            for name, module in model.named_modules()
        ],
        "training": [module.training for module in model.modules()],
    }


@given(config=configs(), dim=sizes, hidden=hidden_sizes)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fuse_after_wrap_restores_everything_but_the_values(
    config: ExFusionConfig, dim: int, hidden: int, bias: bool, dtype: torch.dtype
) -> None:
    model = FFNs(dim, hidden, bias=bias).to(dtype)
    before = shape_of(model)
    assert exf.fuse(exf.wrap(model, config)) is model
    assert shape_of(model) == before


@given(config=configs(expert_init="upcycle", bank_init="uniform"), dim=sizes, hidden=hidden_sizes)
def test_upcycling_leaves_the_function_unchanged_in_eval_and_training(
    config: ExFusionConfig, dim: int, hidden: int
) -> None:
    model = FFNs(dim, hidden).double()
    x = inputs(dim)
    before = model(x)
    exf.wrap(model, config)
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(x), before, rtol=0, atol=1e-12)
    exf.fuse(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shared", "routers"), [(True, 9_216), (False, 46_080)])
def test_deit_tiny_has_the_papers_numbers(shared: bool, routers: int) -> None:
    model = exf.wrap(deit_tiny(), num_experts=4, shared_router=shared)
    wrapped = [m for m in model.modules() if parametrize.is_parametrized(m)]
    assert len(wrapped) == 24
    summary = exf.summarize(model)
    assert len(summary.linears) == 24
    assert summary.num_groups == (12 if shared else 24)
    assert summary.fusion_parameters == routers
    assert sum(p.numel() for n, p in model.named_parameters() if "router" in n) == routers
    exf.fuse(model)
    assert sum(p.numel() for p in model.parameters()) == 5_717_416
    deit_tiny().load_state_dict(model.state_dict(), strict=True)


def test_experts_do_not_depend_on_which_linears_are_wrapped_or_when() -> None:
    dense = FFNs(depth=3)
    whole = exf.wrap(copy.deepcopy(dense), seed=1).state_dict()
    parts = copy.deepcopy(dense)
    for layer in (2, 0, 1):
        exf.wrap(parts, seed=1, layers=(layer,))
    for name, value in parts.state_dict().items():
        assert torch.equal(value, whole[name]), name


def test_draws_are_reproducible_by_seed_by_generator_and_by_torchs_own() -> None:
    dense = FFNs()

    def stack(**kwargs: Any) -> torch.Tensor:
        model = exf.wrap(copy.deepcopy(dense), **kwargs)
        return model.blocks[0].fc1.parametrizations.weight.original

    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    assert torch.equal(stack(seed=1), stack(seed=1))
    assert not torch.equal(stack(seed=1), stack(seed=2))
    assert torch.equal(stack(generator=generator(1)), stack(generator=generator(1)))
    assert not torch.equal(stack(generator=generator(1)), stack(generator=generator(2)))
    torch.manual_seed(5)
    first, second = stack(), stack()
    torch.manual_seed(5)
    assert torch.equal(stack(), first)
    assert not torch.equal(first, second)


def test_a_seed_leaves_torchs_own_generator_alone() -> None:
    model = FFNs()
    before = torch.get_rng_state()
    exf.wrap(model, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_expert_0_keeps_the_models_own_initialisation() -> None:
    model = FFNs()
    weight = model.blocks[0].fc1.weight.detach().clone()
    exf.wrap(model)
    assert torch.equal(model.blocks[0].fc1.parametrizations.weight.original[0], weight)


@pytest.mark.parametrize(
    ("layers", "wrapped"), [((0,), [0]), ((-1, 0), [0, 2]), ((1, 2), [1, 2]), (None, [0, 1, 2])]
)
def test_layers_choose_ffn_groups(layers: tuple[int, ...] | None, wrapped: list[int]) -> None:
    model = exf.wrap(FFNs(depth=3), layers=layers)
    found = [i for i, block in enumerate(model.blocks) if parametrize.is_parametrized(block.fc2)]
    assert found == wrapped


def test_a_config_and_fields_together() -> None:
    model = exf.wrap(FFNs(), ExFusionConfig(num_experts=8, variant="sw"), variant="dw")
    assert exf.summarize(model).configs == (ExFusionConfig(num_experts=8, variant="dw"),)


def test_parameters_keep_their_identity_so_that_references_stay_valid() -> None:
    model = FFNs()
    before = {id(parameter) for parameter in model.parameters()}
    exf.wrap(model, variant="sw")
    assert {id(parameter) for parameter in model.parameters()} == before
    exf.fuse(model)
    assert {id(parameter) for parameter in model.parameters()} == before


def test_gradients_of_another_shape_are_dropped() -> None:
    model = FFNs()
    x = inputs().float()
    model(x).sum().backward()
    exf.wrap(model, variant="sw")
    assert model.blocks[0].fc1.parametrizations.weight.original.grad is None
    assert model.head.weight.grad is not None
    model(x).sum().backward()
    exf.fuse(model)
    assert model.blocks[0].fc1.weight.grad is None


def test_fusing_a_part_leaves_the_rest_wrapped() -> None:
    model = exf.wrap(FFNs(), bank_init="uniform")
    exf.fuse(model.blocks[0])
    assert not parametrize.is_parametrized(model.blocks[0].fc1)
    assert parametrize.is_parametrized(model.blocks[1].fc1)
    exf.fuse(model)
    assert shape_of(model) == shape_of(FFNs())


def test_an_untrained_bank_of_zeros_is_fused_with_a_warning() -> None:
    model = exf.wrap(FFNs())
    with pytest.warns(UserWarning, match=r"memory bank of 2 FFN groups .* Train first"):
        exf.fuse(model)
    assert not model.blocks[0].fc1.weight.any()


def test_upcycling_under_a_bank_of_zeros_warns_and_names_the_way_out() -> None:
    with pytest.warns(UserWarning, match='Use bank_init="uniform"'):
        exf.wrap(FFNs(), expert_init="upcycle")


def test_meta_models_wrap_and_fuse_without_memory() -> None:
    with torch.device("meta"):
        model = FFNs()
    before = shape_of(model)
    for variant in ("sw", "dw", "mb"):
        exf.wrap(model, variant=variant)
        assert all(parameter.is_meta for parameter in model.parameters())
        exf.fuse(model)
        assert shape_of(model) == before


@pytest.mark.parametrize("variant", ["sw", "dw", "mb"])
def test_a_meta_model_becomes_real_by_to_empty_and_reset_parameters(variant: str) -> None:
    with torch.device("meta"):
        model = exf.wrap(FFNs(), variant=variant, bank_init="uniform")
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    stack = model.blocks[0].fc1.parametrizations.weight.original
    assert torch.isfinite(model(inputs().float())).all()
    assert not torch.equal(stack[0], stack[1])
    exf.fuse(model)


@pytest.mark.parametrize("variant", ["sw", "dw", "mb"])
def test_a_meta_model_becomes_real_by_a_dense_checkpoint(variant: str) -> None:
    dense = FFNs()
    with torch.device("meta"):
        model = exf.wrap(FFNs(), variant=variant, bank_init="uniform", expert_init="upcycle")
    model.to_empty(device="cpu")
    exf.load_dense_state_dict(model, dense.state_dict())
    x = inputs().float()
    torch.testing.assert_close(model(x), dense(x))


class ScaledLinear(nn.Linear):
    """A linear with more than weight and bias."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.scale * super().forward(x)


@pytest.mark.parametrize("variant", ["sw", "dw", "mb"])
def test_a_subclass_keeps_its_forward_and_its_other_tensors(variant: str) -> None:
    model = nn.Sequential(ScaledLinear(4, 8), nn.ReLU(), ScaledLinear(8, 4))
    before = shape_of(model)
    exf.wrap(model, variant=variant, bank_init="uniform", filter_fn=["*"])
    model[0].scale.fill_(3.0)
    assert set(model[0].parametrizations) == {"weight", "bias"}
    model(inputs().float())
    state = exf.fused_state_dict(model)
    exf.fuse(model)
    assert shape_of(model) == before
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert model[0].calls == 1
