"""The models of the paper's experiments, at full size: what wrapping adds, and that nothing stays.

Parameters and multiply-adds are compared with what the models' own papers publish, arXiv
2010.11929 (ViT), 2012.12877 (DeiT), 2102.12122 (PVT), 2103.14030 (Swin), 1910.10683 (T5).
Everything runs on the meta device.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import exfusion_param as exf


class Published(NamedTuple):
    """A model, its millions of parameters and billions of multiply-adds, and its FFNs."""

    make: Callable[[], nn.Module]
    parameters: float
    multiply_adds: float | None
    ffns: int


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name)


def _pvt(*depths: int) -> Callable[[], nn.Module]:
    config = transformers.PvtConfig(depths=list(depths), num_labels=1000)
    return lambda: transformers.PvtForImageClassification(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=768, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128
    )
    return transformers.T5ForConditionalGeneration(config)


MODELS = {
    "ViT-S": Published(_timm("vit_small_patch16_224"), 22.1, 4.6, 12),
    "ViT-B": Published(_timm("vit_base_patch16_224"), 86.6, 17.6, 12),
    "DeiT-T": Published(_timm("deit_tiny_patch16_224"), 5.7, 1.3, 12),
    "DeiT-S": Published(_timm("deit_small_patch16_224"), 22.1, 4.6, 12),
    "PVT-T": Published(_pvt(2, 2, 2, 2), 13.2, 1.9, 8),
    "PVT-S": Published(_pvt(3, 4, 6, 3), 24.5, 3.8, 16),
    "PVT-M": Published(_pvt(3, 4, 18, 3), 44.2, 6.7, 28),
    "PVT-L": Published(_pvt(3, 8, 27, 3), 61.4, 9.8, 41),
    "Swin-T": Published(_timm("swin_tiny_patch4_window7_224"), 28.3, 4.5, 12),
    "Swin-S": Published(_timm("swin_small_patch4_window7_224"), 49.6, 8.7, 24),
    "Swin-B": Published(_timm("swin_base_patch4_window7_224"), 87.8, 15.4, 24),
    "T5-base": Published(_t5, 222.9, None, 24),
}


def run(model: nn.Module) -> Tensor:
    """One forward on the meta device."""
    if isinstance(model, transformers.T5ForConditionalGeneration):
        ids = torch.zeros(1, 16, dtype=torch.long, device="meta")
        return model(input_ids=ids, decoder_input_ids=ids).logits
    output = model(torch.empty(1, 3, 224, 224, device="meta"))
    return output if isinstance(output, Tensor) else output.logits


def multiply_adds(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(model)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", MODELS)
def test_wrapped_trained_and_fused_it_is_the_published_model_again(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    published = MODELS[name]
    with torch.device("meta"):
        model = published.make()
    dense_parameters = sum(p.numel() for p in model.parameters())
    dense_shapes = [(key, value.shape) for key, value in model.state_dict().items()]
    dense_cost = multiply_adds(model.eval())

    exf.wrap(model.train(), num_experts=4, bank_init="uniform")
    summary = exf.summarize(model)
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.05))
    run(model).sum().backward()
    optimizer.step()
    wrapped_cost = multiply_adds(model)
    exf.fuse(model)

    assert summary.num_groups == published.ffns
    assert [(key, value.shape) for key, value in model.state_dict().items()] == dense_shapes
    assert sum(p.numel() for p in model.parameters()) == dense_parameters
    assert multiply_adds(model.eval()) == dense_cost
    assert dense_parameters / 1e6 == pytest.approx(published.parameters, rel=0.01)
    if published.multiply_adds is not None:
        assert dense_cost / 1e9 == pytest.approx(published.multiply_adds, rel=0.05)
    with capsys.disabled():
        print(
            f"\n{name:8} {dense_parameters / 1e6:6.1f} M parameters ({published.parameters}), "
            f"{dense_cost / 1e9:5.2f} G multiply-adds ({published.multiply_adds}), "
            f"training with 4 experts {summary.training_parameters / 1e6:6.1f} M, "
            f"{wrapped_cost / dense_cost:.3f} x the multiply-adds of one image",
            end="",
        )
