"""What could make the experts differ: candidates, each to be measured against the control.

As long as the forward sees nothing but a fixed `sum_i w_i E_i`, that sum moves as one dense weight
would, whatever is done to the single experts with a weighted mean of zero. So each candidate either
moves `w` from step to step, or shows the experts different samples.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import exfusion_param as exf
from exfusion_param.fusion_weights.memory_bank import MemoryBank
from support.mixture import ffns_of, with_experts

BETA = 1.0  # weight of the cosine term (arXiv 2102.10472, section 3.2)
SHARE = 0.1  # of the others that an expert takes in each step (arXiv 2308.06093, equation 5)
NOISE = 1e-3  # of the root mean square of a stack, in each step


def _stacks(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith("weight.original")]


def _fusion_weights(model: nn.Module) -> list[nn.Parameter]:
    named = model.named_parameters()
    return [p for name, p in named if name.endswith("fusion_weights.weights")]


def subspace(
    dense: nn.Module, config: exf.ExFusionConfig, concentration: float, whole_network: bool
) -> nn.Module:
    """Fusion weights drawn for each training step; the mid-point in eval, and shipped.

    Learning Neural Network Subspaces (Wortsman et al., 2021, arXiv 2102.10472).

    Args:
        dense: the model; wrapped in place.
        config: of ExFusion; the variant is `dw`, whose fusion weights are set instead of learned.
        concentration: of the Dirichlet distribution of the draws: 1 is uniform on the simplex, more
            is closer to its mid-point.
        whole_network: draw once for all FFNs, instead of for each.
    """
    model = exf.wrap(dense, config, variant="dw", fuse_on="forward")
    for parameter in _fusion_weights(model):
        parameter.requires_grad = False
    count = config.num_experts
    dirichlet = torch.distributions.Dirichlet(torch.full((count,), concentration))

    def draw(module: nn.Module, args: Any) -> None:
        one = dirichlet.sample()
        for parameter in _fusion_weights(module):
            if module.training:
                parameter.copy_(one if whole_network else dirichlet.sample())
            else:
                parameter.fill_(1 / count)

    model.register_forward_pre_hook(draw)
    return model


def around_bank(dense: nn.Module, config: exf.ExFusionConfig, concentration: float) -> nn.Module:
    """Fusion weights drawn around the memory bank for each training step.

    Args:
        dense: the model; wrapped in place.
        config: of ExFusion; the variant is `mb`.
        concentration: of the Dirichlet distribution whose distance from its mid-point is added, as
            a share of the bank's mass.
    """
    model = exf.wrap(dense, config, variant="mb", fuse_on="forward")
    count = config.num_experts
    dirichlet = torch.distributions.Dirichlet(torch.full((count,), concentration))
    offsets: dict[nn.Module, Tensor] = {}

    def draw(module: nn.Module, args: Any) -> None:
        for bank in offsets:
            offsets[bank] = dirichlet.sample() - 1 / count

    def shift(bank: nn.Module, args: Any, weights: Tensor) -> Tensor:
        if not bank.training:
            return weights
        return weights + weights.sum().detach() * offsets[bank].to(weights)

    for module in model.modules():
        if isinstance(module, MemoryBank):
            offsets[module] = torch.zeros(count)
            module.register_forward_hook(shift)
    model.register_forward_pre_hook(draw)
    return model


def cosine(model: nn.Module) -> Tensor:
    """The squared cosine between two experts drawn at random, over all stacks of the network."""
    stacks = _stacks(model)
    first, second = torch.randperm(len(stacks[0]))[:2].tolist()
    pairs = ((first, second), (first, first), (second, second))
    sums = [torch.stack([(stack[i] * stack[j]).sum() for i, j in pairs]) for stack in stacks]
    across, one, other = torch.stack(sums).sum(dim=0)
    return BETA * across.square() / (one * other)


class PartitionedExperts(nn.Module):
    """FFNs that each see another part of the tokens in training; in eval their mean sees all.

    Experts Weights Averaging (Huang et al., 2023, arXiv 2308.06093).

    Args:
        experts: the FFNs.
    """

    def __init__(self, experts: list[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., features), as the FFN's."""
        if not self.training:
            return functional_call(self.experts[0], self.mean(), (x,))
        tokens = x.flatten(0, -2)
        order = torch.randperm(len(tokens), device=x.device)
        parts = order.tensor_split(len(self.experts))
        outputs = [expert(tokens[part]) for expert, part in zip(self.experts, parts, strict=True)]
        return torch.cat(outputs)[order.argsort()].view_as(x)

    def mean(self) -> dict[str, Tensor]:
        """The experts' mean."""
        states = [dict(expert.named_parameters()) for expert in self.experts]
        return {n: torch.stack([s[n] for s in states]).mean(dim=0) for n in states[0]}

    @torch.no_grad()
    def share(self) -> None:
        """Move each expert towards the mean of the others."""
        count = len(self.experts)
        for name, mean in self.mean().items():
            for expert in self.experts:
                parameter = expert.get_parameter(name)
                others = (count * mean - parameter) / (count - 1)
                parameter.lerp_(others, SHARE)


def partitioned(dense: nn.Module, config: exf.ExFusionConfig) -> nn.Module:
    """Put experts that start from the control in the place of each FFN."""
    dense.load_state_dict(exf.fused_state_dict(with_experts(dense, config)))
    for name in ffns_of(dense, config):
        ffn = dense.get_submodule(name)
        experts = [copy.deepcopy(ffn) for _ in range(config.num_experts)]
        dense.set_submodule(name, PartitionedExperts(experts))
    return dense


def share(model: nn.Module) -> None:
    """After each step, let the experts take from each other."""
    for module in model.modules():
        if isinstance(module, PartitionedExperts):
            module.share()


def merged(model: nn.Module) -> nn.Module:
    """The dense model of the experts' means."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PartitionedExperts):
            ffn = module.experts[0]
            ffn.load_state_dict(module.mean(), strict=False)
            model.set_submodule(name, ffn)
    return model


class ExpertRates:
    """Learning rates of single experts, from half to one and a half of the optimizer's.

    Args:
        model: wrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        self.before = [stack.detach().clone() for stack in _stacks(model)]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        """After each step, stretch what it did to each expert."""
        for stack, before in zip(_stacks(model), self.before, strict=True):
            rates = torch.linspace(0.5, 1.5, len(stack), device=stack.device)
            stack.copy_(before + rates[:, None, None] * (stack - before))
            before.copy_(stack)


@torch.no_grad()
def add_noise(model: nn.Module) -> None:
    """After each step, noise that differs between the experts and whose mean is zero."""
    for stack in _stacks(model):
        noise = torch.randn_like(stack)
        stack.add_(noise - noise.mean(dim=0), alpha=NOISE * stack.square().mean().sqrt().item())
