"""Where a wrapped model's experts are, under either `fuse_on`."""

from torch import Tensor, nn

from exfusion_param.fusion.lookup import groups_of


def expert_stacks(model: nn.Module) -> list[Tensor]:
    """The stacks, each of shape (N, *S); under "step" those of the optimizer that has stepped."""
    return [
        stack
        for weights in groups_of(model)
        for stack in (*weights.expert_stacks(), *(fused.experts() for fused in weights.fused))
    ]
