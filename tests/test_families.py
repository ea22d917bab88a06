"""Every family that `wrap` claims: wrapped, trained, fused, loaded where the dense model is."""

import pytest
import torch
from families import FAMILIES

import exfusion_param as exf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("label", FAMILIES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries' own code
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
