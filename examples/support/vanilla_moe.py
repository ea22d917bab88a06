"""A vanilla mixture of linears: the outputs of k experts are computed and summed."""

import copy

from torch import Tensor, nn
from torch.nn import functional as F

from exfusion_param.meo.gating import noisy_top_k


class MixtureOfLinears(nn.Module):
    """The same noisy top-k gate as MEO's, for each sample, in front of whole linears.

    Args:
        linear: each expert starts as a copy of it.
        num_experts: N.
        top_k: how many experts compute.
    """

    def __init__(self, linear: nn.Linear, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(copy.deepcopy(linear) for _ in range(num_experts))
        shape = (num_experts, linear.in_features)
        self.gate = nn.Parameter(linear.weight.new_zeros(shape))
        self.noise = nn.Parameter(linear.weight.new_zeros(shape))
        self.top_k = top_k

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, in) to (batch, tokens, out)."""
        pooled = x.mean(dim=1)
        deviation = F.softplus(pooled @ self.noise.mT) if self.training else None
        gates = noisy_top_k(pooled @ self.gate.mT, self.top_k, deviation).gates
        y = x.new_zeros(*x.shape[:-1], self.experts[0].get_parameter("weight").shape[0])
        if self.top_k == len(self.experts):
            for expert, weight in zip(self.experts, gates.mT, strict=True):
                y = y + weight.view(-1, 1, 1) * expert(x)
            return y
        for i, expert in enumerate(self.experts):
            rows = gates[:, i].nonzero().flatten()
            if len(rows):
                y = y.index_add(0, rows, gates[rows, i].view(-1, 1, 1) * expert(x[rows]))
        return y


def replace_linears(model: nn.Module, names: list[str], num_experts: int, top_k: int) -> nn.Module:
    """Put a mixture in the place of each of these linears."""
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, MixtureOfLinears(linear, num_experts, top_k))
    return model
