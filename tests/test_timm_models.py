"""What timm's own tests ask of a model, asked of small Transformers of timm that are wrapped.

The suite takes some; `make nightly` takes all.
"""

import copy
import os
from typing import Any

import pytest
import timm
import torch
from torch import nn

import exfusion_param as exf

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
FEW = ["test_vit", "convnext_atto"]
ALL = [
    *FEW,
    "test_convnext",
    "swin_tiny_patch4_window7_224",
    "test_vit2",
    "test_vit3",
    "test_vit4",
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "coat_lite_tiny",
    "coatnet_0_rw_224",
    "convit_tiny",
    "crossvit_tiny_240",
    "davit_tiny",
    "deit3_small_patch16_224",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientvit_m0",
    "eva02_tiny_patch14_224",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "gmlp_s16_224",
    "hiera_tiny_224",
    "levit_128s",
    "maxvit_rmlp_pico_rw_256",
    "mixer_s32_224",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "nextvit_small",
    "pit_ti_224",
    "poolformer_s12",
    "pvt_v2_b0",
    "repvit_m0_9",
    "resmlp_12_224",
    "sequencer2d_s",
    "shvit_s1",
    "swiftformer_xs",
    "swinv2_tiny_window8_256",
    "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224",
    "twins_svt_small",
    "vit_tiny_patch16_224",
    "vitamin_small_224",
    "volo_d1_224",
    "xcit_nano_12_p16_224",
]
SETTINGS = [
    {"variant": variant, "fuse_on": mode}
    for variant in ("dw", "mb")
    for mode in ("forward", "step")
]


def make(name: str, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    return exf.wrap(model, num_experts=2, bank_init="uniform", seed=0, **fields)


def images(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, *model.default_cfg["input_size"])


@pytest.mark.parametrize(
    "name", [name for name in (ALL if NIGHTLY else FEW) if timm.is_model(name)]
)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s['variant']}-{s['fuse_on']}")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:wrap.. leaves:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_wrapped_model_of_timm_passes_what_timm_asks_of_it(
    name: str, settings: dict[str, Any]
) -> None:
    model = make(name, **settings).eval()
    x = images(model)

    with torch.no_grad():
        output = model(x)  # forward
        assert output.shape == (2, 7)
        assert output.isfinite().all()
        features = model.forward_features(x)
        torch.testing.assert_close(model.forward_head(features), output)
    with pytest.raises(RuntimeError, match=r"Call fuse\(model\) first"):
        torch.jit.script(model)

    model.train()
    model(x).mean().backward()  # backward
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert [n for n in missing if not n.endswith(("router", "vector"))] == []
    model.zero_grad()

    twin = make(name, **settings)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        ours = model.eval()(x)
        assert torch.equal(twin.eval()(x), ours)
        torch.testing.assert_close(exf.fuse(model)(x), ours)
        fresh = timm.create_model(name, num_classes=7).eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(x), model(x))
        fresh.reset_classifier(0)
        assert fresh(x).ndim >= 2
