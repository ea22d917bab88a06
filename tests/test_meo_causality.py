"""MEO beside attention that hides later tokens: gates do so too, or an error says how."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exfusion_param import meo
from exfusion_testing.meo_models import with_random_gates

TOKENS = 6
LATER = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
ADDED = torch.zeros(TOKENS, TOKENS, dtype=torch.float64).masked_fill(LATER, -math.inf)


def product(**kwargs: Any) -> Any:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **kwargs)


def by_hand(mask: Callable[[Tensor], Tensor], softmax: Callable[[Tensor], Tensor]) -> Any:
    return lambda q, k, v: softmax(mask(q @ k.mT / math.sqrt(q.shape[-1]))) @ v


def multi_head(**kwargs: Any) -> Any:
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    return lambda q, k, v: attention(q, k, v, **kwargs)[0]


CAUSAL: dict[str, Any] = {
    "is_causal": product(is_causal=True),
    "positional": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, True),
    "boolean mask": product(attn_mask=~LATER),
    "added mask": product(attn_mask=ADDED),
    "masked_fill": by_hand(lambda s: s.masked_fill(LATER, -math.inf), lambda s: s.softmax(-1)),
    "large number": by_hand(lambda s: s - 1e9 * LATER, lambda s: torch.softmax(s, -1)),
    "functional": by_hand(lambda s: s + ADDED, lambda s: F.softmax(s, dim=-1)),
    "multi-head": multi_head(attn_mask=LATER),
    "multi-head, added": multi_head(attn_mask=ADDED, is_causal=True, need_weights=False),
}
OPEN: dict[str, Any] = {
    "no mask": product(),
    "padding": product(attn_mask=torch.arange(TOKENS) < TOKENS - 1),
    "a band": product(attn_mask=~LATER.triu(3)),
    "by hand": by_hand(lambda s: s, lambda s: s.softmax(-1)),
    "multi-head": multi_head(),
}


class Layer(nn.Module):
    """Attention that no module speaks of, and an FFN."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.mlp = timm.layers.Mlp(4, 8)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, T, 4) to the same shape."""
        x = x + self.attend(*self.qkv(x).chunk(3, dim=-1))
        y: Tensor = x + self.mlp(x)
        return y


def model_of(*attends: Any, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*map(Layer, attends)).double()
    return with_random_gates(meo.wrap(model, num_experts=4, top_k=2, seed=0, **fields))


def leak(model: nn.Module) -> float:
    """How much later tokens change the outputs of the first three."""
    x = torch.randn(2, TOKENS, 4, dtype=torch.float64)
    later = torch.cat([x[:, :3], x[:, 3:] + 1], dim=1)
    return float((model(x) - model(later))[:, :3].detach().abs().max())


@pytest.mark.parametrize("shared_gate", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_attention_that_no_module_speaks_of_is_seen_in_the_first_forward(
    name: str, shared_gate: bool
) -> None:
    attend = CAUSAL[name]
    fields: Any = {"shared_gate": shared_gate, "segment_length": 2}
    model = model_of(attend, attend, **fields).eval()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"'0\.mlp.* hides later tokens.*causal=True"):
            leak(model)
    assert leak(model_of(attend, attend, causal=True, **fields).eval()) < 1e-12
    assert leak(model_of(attend, attend, causal=False, **fields).eval()) > 1e-3


@pytest.mark.parametrize("name", OPEN)
def test_other_attention_raises_nothing(name: str) -> None:
    leak(model_of(OPEN[name], OPEN[name]))


def test_the_first_ffn_behind_causal_attention_is_named() -> None:
    model = model_of(OPEN["no mask"], CAUSAL["is_causal"])
    with pytest.raises(RuntimeError, match=r"'1\.mlp"):
        leak(model)


def test_a_first_forward_of_one_token_leaves_it_to_the_next() -> None:
    model = model_of(CAUSAL["is_causal"])
    model(torch.randn(2, 1, 4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="hides later tokens"):
        leak(model)


@pytest.mark.parametrize("by_argument", [False, True])
def test_masks_of_torchs_encoders_are_seen(by_argument: bool) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double()
    model = nn.TransformerEncoder(layer, 2)
    model = meo.wrap(model, num_experts=4, top_k=2, seed=0).eval()
    x = torch.randn(2, TOKENS, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="hides later tokens"):
        model(x, mask=ADDED, is_causal=True if by_argument else None)


@pytest.mark.parametrize("fields", [{}, {"level": "token"}, {"shared_gate": True}])
@pytest.mark.parametrize("batch_first", [False, True])
def test_torchs_layers_take_a_sample_without_a_batch(batch_first: bool, fields: Any) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=batch_first).double()
    layer = with_random_gates(meo.wrap(layer, num_experts=4, top_k=2, seed=0, **fields)).eval()
    x = torch.randn(TOKENS, 4, dtype=torch.float64)
    expected = layer(x.unsqueeze(0 if batch_first else 1)).squeeze(0 if batch_first else 1)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
