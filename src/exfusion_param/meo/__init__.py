"""Merging Experts into One (MEO): weights merged from the experts that each sample chooses.

    from exfusion_param import meo

    meo.wrap(model, num_experts=8, top_k=4)  # a merged weight for each sample
    ...
    loss = task_loss + meo.balance_loss(model)

The method is that of He et al., EMNLP 2023 (arXiv 2310.09832). As in ExFusion an expert is one
linear, and the activation stays outside: it is the same parametrization with other fusion weights,
and all that works with a wrapped model works with this one. These parts are specific to MEO:

- gates: `gating` has their mathematics, `gate` is the module, and `balance` is the loss that keeps
  their choices even;
- what gates read: `pooling`, by samples or by segments; `surroundings` tells causal models by the
  modules around an FFN, and `attention_watch` looks for causal attention that does not tell;
- the linears: `gated_forward` merges for each sample, by the products in `merging`;
- the model: `model_forwards` tells its forwards apart for what gates record, and keeps it off fast
  paths and its cache; `tasks` sets its task, and makes it the dense model of one.
"""

from .api import wrap
from .balance import balance_loss
from .config import MEOConfig
from .tasks import fuse, fused_state_dict, set_task

__all__ = ["MEOConfig", "balance_loss", "fuse", "fused_state_dict", "set_task", "wrap"]
