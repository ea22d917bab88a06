"""The first values of a sharded model that was built on the meta device."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from exfusion_param.fusion_weights.base import FusionWeights


@torch.no_grad()
def init(model: nn.Module, seed: int) -> None:
    """Draw routers and all other parameters; the experts are drawn at the optimizer's first step.

    Every rank draws each tensor whole, one at a time, and keeps its part: the model that a run
    starts with is the same on any number of ranks. DTensor's own random operators do not promise
    that, and on CPUs give all ranks the same part.
    """
    torch.manual_seed(seed)
    own: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, FusionWeights):
            module.reset_parameters()
            own.update(module.parameters())
    for name, parameter in model.named_parameters():
        if parameter not in own:
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            parameter.copy_(_like(parameter, _first_value(name, value)))


def _first_value(name: str, value: Tensor) -> Tensor:
    """As in ViTs: small matrices and embeddings, no bias, norms that scale by one."""
    if value.ndim > 1:
        return nn.init.trunc_normal_(value, std=0.02)
    return value.zero_() if name.endswith("bias") else value.fill_(1)


def _like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)  # no traffic
