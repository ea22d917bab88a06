"""Every family that `wrap` claims: wrapped, trained, fused, loaded where the dense model is."""

from pathlib import Path

import pytest
import torch
from timm.models import load_checkpoint
from timm.utils import CheckpointSaver

import exfusion_param as exf
from exfusion_param.tensors import functional
from exfusion_testing.families import FAMILIES


def test_the_router_of_a_convolutional_ffn_reads_the_channels_of_every_pixel() -> None:
    model = exf.wrap(FAMILIES["PoolFormer"].make(), momentum=0.0).train()
    mlp = model.stages[0].blocks[0].mlp
    x = torch.randn(2, mlp.fc1.in_channels, 5, 7)
    weights = mlp.fc1.parametrizations.weight[0].fusion_weights
    pixels = x.permute(0, 2, 3, 1).reshape(2 * 5 * 7, -1)
    expected = functional.route(pixels, weights.router).detach()
    mlp(x).sum().backward()
    torch.optim.SGD(mlp.parameters(), lr=0.0).step()
    torch.testing.assert_close(weights.bank, expected)


def test_gate_and_value_may_run_in_either_order() -> None:
    mlp = exf.wrap(FAMILIES["Llama"].make(), momentum=0.0).train().layers[0].mlp
    weights = mlp.gate_proj.parametrizations.weight[0].fusion_weights
    x = torch.randn(2, 5, 16)
    expected = functional.route(x, weights.router).detach()
    up = mlp.up_proj(x)
    mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * up).sum().backward()
    torch.optim.SGD(mlp.parameters(), lr=0.0).step()
    torch.testing.assert_close(weights.bank, expected)


def test_timms_own_saver_takes_a_fused_model(tmp_path: Path) -> None:
    model = exf.fuse(exf.wrap(FAMILIES["ViT"].make(), variant="sw"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0)
    fresh = FAMILIES["ViT"].make()
    load_checkpoint(fresh, str(tmp_path / "last.pth.tar"), strict=True)
    assert all(map(torch.equal, model.state_dict().values(), fresh.state_dict().values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("label", FAMILIES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries' own code
@pytest.mark.filterwarnings("ignore:The router of:UserWarning")  # with this lr and 2 experts
def test_wrap_three_steps_fuse_and_a_strict_load_into_a_fresh_model(
    label: str, dtype: torch.dtype
) -> None:
    family = FAMILIES[label]
    model = family.make().to(dtype)
    dense = {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}
    exf.wrap(model, num_experts=2, seed=0)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.05), lr=1e-2)
    model.train()
    for _ in range(3):
        output = family.run(model, dtype)
        (output.float() - 1).square().mean().backward()  # some heads start at zero
        optimizer.step()
        optimizer.zero_grad()
    trained = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    stacks = {name for name in start if name.endswith("original")}
    assert stacks <= trained
    banks = {name: bank for name, bank in model.named_buffers() if name.endswith(".bank")}
    assert banks
    for name, bank in banks.items():
        assert bank.sum().item() == pytest.approx(1 - 0.95**3, abs=1e-5), name

    model.eval()
    with torch.no_grad():
        expected = family.run(model, dtype)
        exf.fuse(model)
        assert {n: (v.shape, v.dtype) for n, v in model.state_dict().items()} == dense
        fresh = family.make().to(dtype).eval()
        fresh.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(family.run(fresh, dtype), expected)
