"""Merging Experts into One (MEO): weights merged from the experts that each sample chooses.

    from exfusion_param import meo

    meo.wrap(model, num_experts=8, top_k=4)  # a merged weight for each sample
    ...
    loss = task_loss + meo.balance_loss(model)

The method is that of He et al., EMNLP 2023 (arXiv 2310.09832). As in ExFusion an expert is one
linear, and the activation stays outside: it is the same parametrization with other fusion weights,
and all that works with a wrapped model works with this one. What is its own: gates (gating.py,
gate.py), what they read (pooling.py), and products with a weight for each sample (merging.py).
"""

from .api import fuse, fused_state_dict, set_task, wrap
from .balance import balance_loss
from .config import MEOConfig

__all__ = ["MEOConfig", "balance_loss", "fuse", "fused_state_dict", "set_task", "wrap"]
