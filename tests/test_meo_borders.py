"""MEO where other people's code meets it: parts of models, threads, flat tokens."""

import copy
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch import nn

from exfusion_param import meo
from exfusion_param.fusion.lookup import groups_of


def vit() -> nn.Module:
    settings = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.models.VisionTransformer(img_size=32, **settings)


def test_parts_that_are_called_without_the_model_keep_the_last_forward_alone() -> None:
    model = meo.wrap(vit(), shared_gate=True)
    for _ in range(3):
        model.forward_head(model.forward_features(torch.randn(2, 3, 32, 32)))
        kept = [len(gate.recorded) for gate in groups_of(model)]
        assert kept == [1] * len(kept)


def test_micro_batches_by_parts_of_a_model_train() -> None:
    torch.manual_seed(0)
    model = meo.wrap(vit(), shared_gate=True, gating="softmax", balance_weight=0.1)
    twin = copy.deepcopy(model)
    for images in torch.randn(2, 2, 3, 32, 32):
        for one, output in (
            (model, model.forward_head(model.forward_features(images))),
            (twin, twin(images)),
        ):
            (output.square().sum() + meo.balance_loss(one)).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """The interpreter changes threads after each few instructions."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("hasty_threads")
def test_a_model_in_eval_serves_several_threads() -> None:
    torch.manual_seed(0)
    model = meo.wrap(vit(), shared_gate=True).eval()
    inputs = torch.randn(40, 1, 3, 32, 32)
    with torch.no_grad():
        expected = [model(x) for x in inputs]

    def serve(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(x)

    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for output, right in zip(pool.map(serve, inputs), expected, strict=True):
                assert torch.equal(output, right)
