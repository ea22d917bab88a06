"""Models that share, lack or replace modules, and unusual shapes and formats of linears."""

import copy
import gc
from typing import Any

import pytest
import timm
import timm.utils
import torch
import transformers
from timm.layers import Mlp
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_param import meo
from exfusion_testing.models import FFNs, inputs, loss_of

VARIANTS = ["sw", "dw", "mb"]
MODES = ["forward", "step"]
SETTINGS = [{"variant": variant, "fuse_on": mode} for variant in VARIANTS for mode in MODES]


def wrapped(model: nn.Module, settings: dict[str, Any], **fields: Any) -> Any:
    return exf.wrap(model, **{"bank_init": "uniform", "seed": 0} | settings | fields)


def trains_and_fuses(model: Any, x: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        loss_of(model, x).backward()
        optimizer.step()
    assert not all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    expected = model.eval()(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    torch.testing.assert_close(exf.fuse(model)(x), expected)


class Blocks(nn.Module):
    """Two blocks that hold one FFN each, or the same."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        ffns = [Mlp(4, 6), Mlp(4, 6)]
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(4), "mlp": ffns[0 if shared else i]})
            for i in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["mlp"](block["norm"](x))
        return x


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(4), mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def of_blocks_with_one_ffn() -> nn.Module:
    ffn = Mlp(4, 6)
    return nn.Sequential(Block(ffn), Block(ffn))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("make", [lambda: Blocks(shared=True), of_blocks_with_one_ffn])
def test_blocks_that_share_an_ffn_share_its_experts(settings: Any, make: Any) -> None:
    model = wrapped(make(), settings)
    assert len(exf.metrics(model)) == len(exf.metrics(wrapped(Mlp(4, 6), settings)))
    trains_and_fuses(model, inputs().float())


@pytest.mark.parametrize("name", ["fc1", "fc2"])
def test_ffns_that_share_one_linear_are_refused_and_one_of_them_can_be_chosen(name: str) -> None:
    def model() -> FFNs:
        ffns = FFNs()
        setattr(ffns.blocks[1], name, getattr(ffns.blocks[0], name))
        return ffns

    with pytest.raises(ValueError, match=f"blocks.1.{name} is the same module as blocks.0.{name}"):
        exf.wrap(model())
    chosen = wrapped(model(), {"variant": "dw"}, filter_fn=["blocks.0.*"])
    trains_and_fuses(chosen, inputs().float())


def test_a_linear_that_is_listed_twice_in_its_model_is_one() -> None:
    model = FFNs()
    model.every = nn.ModuleList([model.blocks[0].fc1, model.blocks[1].fc2])
    trains_and_fuses(wrapped(model, {"variant": "mb"}), inputs().float())


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_part_lives_on_without_the_whole(settings: Any) -> None:
    model = wrapped(FFNs(), settings)
    part, copied = model.blocks[0], copy.deepcopy(model.blocks[1])
    del model
    gc.collect()
    trains_and_fuses(part, inputs().float())
    trains_and_fuses(copied, inputs().float())


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_layer_of_transformers_lives_on_without_its_model(settings: Any) -> None:
    config = transformers.BertConfig(
        hidden_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=6,
        vocab_size=8,
        max_position_embeddings=4,
    )
    model = wrapped(transformers.BertModel(config), settings)
    layer = model.encoder.layer[0]
    del model
    gc.collect()
    replica = copy.deepcopy(layer).eval()
    x = inputs().float()
    expected = replica(x)
    torch.testing.assert_close(exf.fuse(layer).eval()(x), expected)


def test_a_part_of_a_model_under_meo_lives_on_without_the_whole() -> None:
    model = meo.wrap(FFNs(), level="sequence", causal=True, batch_dim=0)
    part, x = model.blocks[0], inputs().float()
    del model
    gc.collect()
    torch.testing.assert_close(copy.deepcopy(part).eval()(x), part.eval()(x))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp(4, 6, use_conv=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_wrapped_model_takes_channels_last_as_the_dense_one_does(settings: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
    model = wrapped(Convolutions(), settings)
    expected = model.eval()(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), expected)
    trains_and_fuses(model.train(), x)
    assert model.mlp.fc1.weight.is_contiguous(memory_format=torch.channels_last)
    trains_and_fuses(
        wrapped(FFNs(), settings).to(memory_format=torch.channels_last), inputs().float()
    )


def test_a_model_of_convolutions_comes_from_the_meta_device() -> None:
    with torch.device("meta"):
        model = wrapped(Convolutions(), {"variant": "mb"})
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    trains_and_fuses(model, torch.randn(2, 4, 3, 3))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.filterwarnings("ignore:The experts of .* its router has seen no input")
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_linear_without_inputs_wraps(settings: Any) -> None:
    model = nn.Sequential(nn.Linear(0, 4), nn.ReLU(), nn.Linear(4, 2))
    trains_and_fuses(wrapped(model, settings, filter_fn=["*"]), torch.randn(3, 0))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_dtypes_that_experts_cannot_train_in_are_refused(dtype: torch.dtype) -> None:
    model = FFNs()
    for linear in (model.blocks[0].fc1, model.blocks[0].fc2):
        linear.weight = nn.Parameter(linear.weight.detach().to(dtype))
    with pytest.raises(ValueError, match="blocks.0.fc2: are not of a floating dtype of 16 bits"):
        exf.wrap(model)
    exf.wrap(model, layers=(1,))


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("settings", SETTINGS)
def test_replicas_and_torchscript_are_refused_with_the_way_out(settings: Any) -> None:
    model = wrapped(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), settings)
    with pytest.raises(RuntimeError, match="Use torch.nn.parallel.DistributedDataParallel"):
        # as torch.nn.parallel.replicate does on GPUs
        _ = [module._replicate_for_data_parallel() for module in model.modules()]
    with pytest.raises(RuntimeError, match=r"TorchScript .* Call fuse\(model\) first"):
        torch.jit.script(model)
    x = inputs().float()
    expected = model.eval()(x)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
    torch.testing.assert_close(torch.jit.script(exf.fuse(copy.deepcopy(model)))(x), expected)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_printed_model_says_what_is_attached_to_it(settings: Any) -> None:
    text = repr(wrapped(FFNs(), settings))
    variant = settings["variant"]
    expected = f"ExFusion {variant}, num_experts=4, group='blocks.1'"
    assert expected + (", momentum=0.95)" if variant == "mb" else ")") in text
    assert text.count("4 x (6, 4)") == (2 if settings["fuse_on"] == "forward" else 0)
    assert text.count("4 x (4,)") == (2 if settings["fuse_on"] == "forward" else 0)


@pytest.mark.parametrize(
    "wrap", [*SETTINGS, meo.wrap], ids=["-".join(s.values()) for s in SETTINGS] + ["meo"]
)
def test_whatever_looks_at_every_attribute_meets_nothing_but_attribute_errors(wrap: Any) -> None:
    model = wrap(FFNs()) if callable(wrap) else wrapped(FFNs(), wrap)
    for module in model.modules():
        for name in dir(module):
            hasattr(module, name)  # raises whatever is not an AttributeError


@pytest.mark.parametrize("settings", SETTINGS[4:])
def test_timm_merges_the_branches_of_a_wrapped_model(settings: Any) -> None:
    """It calls the method `fuse` of each module that has one, so that fusion weights have none."""
    model = wrapped(timm.create_model("fastvit_t8", layers=(1, 1, 1, 1)).double(), settings).eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = model(x)
    merged = timm.utils.reparameterize_model(model)
    torch.testing.assert_close(merged(x), expected)
    torch.testing.assert_close(exf.fuse(merged)(x), expected)
