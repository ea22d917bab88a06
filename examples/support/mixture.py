"""The mixture that the paper compares with: each token goes to one of N whole FFNs (MoE-N-1)."""

import copy
import os

import torch
from torch import Tensor, nn

import exfusion_param as exf


class TopOneMixture(nn.Module):
    """N FFNs and a router that sends each token to one of them (Switch, arXiv 2101.03961).

    Args:
        experts: FFNs that map (..., features) to (..., features).
        features: of a token.
    """

    def __init__(self, experts: list[nn.Module], features: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = nn.Linear(features, len(experts), bias=False)
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., features), as the FFN's; each expert's output by its share."""
        tokens = x.flatten(0, -2)
        shares = self.router(tokens).softmax(dim=-1)
        share, chosen = shares.max(dim=-1)
        taken = nn.functional.one_hot(chosen, len(self.experts)).to(shares.dtype)
        self.balance = len(self.experts) * (taken.mean(0) * shares.mean(0)).sum()  # equation 4
        y = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):  # one without tokens still gets its gradient
            rows = (chosen == i).nonzero().flatten()
            y = y.index_add(0, rows, (share[rows, None] * expert(tokens[rows])).to(y.dtype))
        return y.view_as(x)


def balance_loss(model: nn.Module) -> Tensor:
    """The mean of what the mixtures lose by sending tokens unevenly, 1 where all is even."""
    return torch.stack([m.balance for m in model.modules() if isinstance(m, TopOneMixture)]).mean()


def with_experts(dense: nn.Module, config: exf.ExFusionConfig) -> nn.Module:
    """A copy of the model that holds the experts of this seed, with equal fusion weights."""
    plain = config.replace(variant="sw", fuse_on="forward")
    return exf.wrap(copy.deepcopy(dense), plain)


def ffns_of(dense: nn.Module, config: exf.ExFusionConfig) -> dict[str, list[str]]:
    """By the names of a model's FFNs the names of their linears.

    Raises:
        SystemExit: an FFN of the model is not a module of its own.
    """
    groups: dict[str, list[str]] = {}
    for linear in exf.summarize(dense, config).linears:
        groups.setdefault(linear.group, []).append(linear.name)
    ffns = {}
    for linears in groups.values():
        name = os.path.commonpath([linear.replace(".", "/") for linear in linears])
        ffns[name := name.replace("/", ".")] = linears
        inside = {id(p) for linear in linears for p in dense.get_submodule(linear).parameters()}
        if not inside.issuperset(map(id, dense.get_submodule(name).parameters())):
            raise SystemExit(f"{name} does more than its linears: nothing can take its place.")
    return ffns


def replace_ffns(model: nn.Module, config: exf.ExFusionConfig) -> nn.Module:
    """Put a mixture in the place of each FFN, of the experts that ExFusion would start from.

    Args:
        model: dense; changed in place.
        config: of ExFusion.
    """
    wrapped = with_experts(model, config)
    for name, linears in ffns_of(model, config).items():
        ffn = model.get_submodule(name)
        experts = [
            _expert(ffn, name, linears, wrapped, number) for number in range(config.num_experts)
        ]
        first = model.get_submodule(linears[0])
        assert isinstance(first, nn.Linear)
        model.set_submodule(name, TopOneMixture(experts, first.in_features))
    return model


def _expert(
    ffn: nn.Module, name: str, linears: list[str], wrapped: nn.Module, number: int
) -> nn.Module:
    """A copy of the FFN with the weights of one expert of each of its linears."""
    expert = copy.deepcopy(ffn)
    for linear in linears:
        stacks = wrapped.get_submodule(f"{linear}.parametrizations")
        for key, parameter in expert.get_submodule(linear[len(name) + 1 :]).named_parameters():
            stack = stacks.get_submodule(key).get_parameter("original")
            parameter.data.copy_(stack.detach()[number])
    return expert
