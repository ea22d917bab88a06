"""What ExFusion is compared with: a plain implementation of the paper, and mixtures of experts.

Each function puts another module in the place of every FFN of a ViT of timm. Mixtures activate as
many parameters for a token as the dense FFN has: those that send each token to two experts have
experts of half the width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Replace = Callable[[int, int, int], nn.Module]


class LoopLinear(nn.Module):
    """The paper's equation as it is read: a new class, and a loop over N linears' weights."""

    def __init__(self, in_features: int, out_features: int, num_experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Linear(in_features, out_features) for _ in range(num_experts)
        )

    def forward(self, x: Tensor, fusion_weights: Tensor) -> Tensor:
        """(..., in_features) and (N,) to (..., out_features)."""
        weight = sum(
            w * expert.weight for w, expert in zip(fusion_weights, self.experts, strict=True)
        )
        bias = sum(w * expert.bias for w, expert in zip(fusion_weights, self.experts, strict=True))
        return F.linear(x, weight, bias)


class LoopFFN(nn.Module):
    """An FFN of the memory-bank variant, as a script would have it."""

    bank: Tensor

    def __init__(self, dim: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.fc1 = LoopLinear(dim, hidden, num_experts)
        self.fc2 = LoopLinear(hidden, dim, num_experts)
        self.register_buffer("bank", torch.full((num_experts,), 1 / num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to the same."""
        current = self.router(x).softmax(dim=-1).mean(dim=(0, 1))
        bank = 0.95 * self.bank + 0.05 * current
        self.bank.copy_(bank.detach())
        return self.fc2(F.gelu(self.fc1(x, bank)), bank)


class AveragedOutputs(nn.Module):
    """Outputs averaged instead of weights: N FFNs run."""

    def __init__(self, dim: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.ffns = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
            for _ in range(num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to the same."""
        return torch.stack([ffn(x) for ffn in self.ffns]).mean(dim=0)


class FirstOutput(nn.Module):
    """A mixture that returns its losses too."""

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to the same."""
        output: Tensor = self.moe(x)[0]
        return output


def switch(dim: int, hidden: int, num_experts: int) -> nn.Module:
    """Transformers' Switch block: one expert for each token (arXiv 2101.03961)."""
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersSparseMLP,
    )

    config = SwitchTransformersConfig(
        d_model=dim, d_ff=hidden, num_experts=num_experts, expert_capacity=1 << 16
    )
    return SwitchTransformersSparseMLP(config)


def st_moe(dim: int, hidden: int, num_experts: int) -> nn.Module:
    """st-moe-pytorch: two experts for each token (arXiv 2202.08906)."""
    from st_moe_pytorch import MoE

    return FirstOutput(MoE(dim, num_experts, expert_hidden_mult=hidden // dim // 2))


def mixture_of_experts(dim: int, hidden: int, num_experts: int) -> nn.Module:
    """mixture-of-experts: two experts for each token (arXiv 1701.06538)."""
    from mixture_of_experts import MoE

    return FirstOutput(MoE(dim, num_experts, hidden_dim=hidden // 2))


def top_one(dim: int, hidden: int, num_experts: int) -> nn.Module:
    """The paper's MoE-N-1: N whole FFNs, one for each token (examples/support/mixture.py).

    It stays eager in a compiled model, as the shapes within it depend on the tokens.
    """
    from support.mixture import TopOneMixture

    ffns: list[nn.Module] = [
        nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        for _ in range(num_experts)
    ]
    mixture = TopOneMixture(ffns, dim)
    mixture.forward = torch.compiler.disable(mixture.forward)  # type: ignore[method-assign]
    return mixture


def soft_moe(dim: int, hidden: int, num_experts: int) -> nn.Module:
    """soft-moe-pytorch: slots that mix all tokens (arXiv 2308.00951)."""
    from soft_moe_pytorch import SoftMoE

    return SoftMoE(dim, seq_len=200, num_experts=num_experts, expert_mult=hidden // dim)


PEERS: dict[str, Replace] = {
    "loop over linears": LoopFFN,
    "averaged outputs": AveragedOutputs,
    "Switch (transformers)": switch,
    "st-moe-pytorch": st_moe,
    "mixture-of-experts": mixture_of_experts,
    "soft-moe-pytorch": soft_moe,
    "MoE-N-1": top_one,
}


def replace_ffns(model: nn.Module, replace: Replace, num_experts: int) -> nn.Module:
    """Put other FFNs into a ViT of timm, in place.

    Args:
        model: with `blocks`, and an `mlp` in each.
        replace: makes an FFN from its features, its hidden features and N.
        num_experts: N.
    """
    for block in model.get_submodule("blocks").children():
        dense = block.get_submodule("mlp")
        fc1 = dense.get_submodule("fc1")
        assert isinstance(fc1, nn.Linear)
        block.register_module("mlp", replace(fc1.in_features, fc1.out_features, num_experts))
    return model
