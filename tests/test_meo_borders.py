"""MEO and other people's code: parts of models, threads, flat tokens."""

import copy
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from exfusion_param import meo
from exfusion_param.fusion.lookup import groups_of
from exfusion_testing.meo_models import with_random_gates
from exfusion_testing.models import FFNs, inputs


def vit() -> nn.Module:
    settings = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.models.VisionTransformer(img_size=32, **settings)


def test_parts_that_are_called_without_the_model_keep_only_the_last_forward() -> None:
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

    def serve(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for output, right in zip(pool.map(serve, inputs), expected, strict=True):
                assert torch.equal(output, right)


class Meet(nn.Module):
    """An activation in which two threads wait for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.barrier = threading.Barrier(2, timeout=20)

    def forward(self, x: Tensor) -> Tensor:
        """x, once both threads are here."""
        self.barrier.wait()
        return x.relu()


@pytest.mark.parametrize("by_parts", [False, True])
def test_a_model_that_two_threads_train_is_refused_clearly(by_parts: bool) -> None:
    model = FFNs(depth=1).double()
    model.blocks[0].act = Meet()
    meo.wrap(model, num_experts=4, top_k=2)
    run = model.blocks[0] if by_parts else model

    def forward(x: Tensor) -> str:
        try:
            run(x).sum().backward()
        except RuntimeError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        errors = [error for error in pool.map(forward, [inputs(), inputs()]) if error]
    assert errors
    assert all("two threads" in error and "gates" in error for error in errors)


def test_the_balance_of_a_forward_that_another_thread_has_begun_is_refused() -> None:
    model = meo.wrap(FFNs().double(), num_experts=4, top_k=2)
    with ThreadPoolExecutor(1) as other:
        for _ in range(2):  # one after the other they may train it
            (model(inputs()).sum() + meo.balance_loss(model)).backward()
            loss = other.submit(lambda: model(inputs()).sum() + meo.balance_loss(model)).result()
            loss.backward()
        model(inputs())
        other.submit(model, inputs()).result()
        with pytest.raises(RuntimeError, match="two threads"):
            meo.balance_loss(model)


def test_a_forward_that_failed_leaves_the_next_ones_of_parts_apart() -> None:
    model = meo.wrap(FFNs().double(), num_experts=4, top_k=2)
    with pytest.raises(RuntimeError):
        model(inputs(dim=5))
    for _ in range(3):
        model.blocks[1](model.blocks[0](inputs()))
        assert all(len(gate.recorded) == 1 for gate in groups_of(model))


@pytest.mark.parametrize("fields", [{}, {"gating": "softmax", "top_k": None}, {"level": "token"}])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_batches_without_samples_or_tokens_train(shape: tuple[int, int], fields: Any) -> None:
    model = meo.wrap(FFNs().double(), **{"num_experts": 4, "top_k": 2} | fields)
    x = torch.ones(*shape, 4, dtype=torch.float64)
    y = model(x)
    assert y.shape == (*shape, 3)
    (y.sum() + meo.balance_loss(model)).backward()
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


class Block(nn.Module):
    """A block of OpenAI's CLIP, whose attention takes (tokens, batch, D) unless told otherwise."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.mlp(x)


class Pooled(nn.Module):
    """Blocks, and a pooling attention with its own order of dimensions."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.blocks = nn.Sequential(Block(batch_first), Block(batch_first))
        self.pool = nn.MultiheadAttention(8, 2, batch_first=not batch_first)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(x if self.batch_first else x.transpose(0, 1))
        y = y.transpose(0, 1)  # as the pool takes it
        y = self.pool(y, y, y)[0]
        return y.transpose(0, 1) if self.batch_first else y


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_attention_beside_an_ffn_tells_which_dimension_runs_over_samples(
    batch_first: bool,
) -> None:
    torch.manual_seed(0)
    model = meo.wrap(Pooled(batch_first).double(), num_experts=4, top_k=2, seed=0)
    with_random_gates(model).eval()
    x = inputs(8, 3, 5)
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=0, atol=1e-12)
