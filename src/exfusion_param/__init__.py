"""ExFusion for any PyTorch model: FFN weights trained as weighted sums of experts, shipped dense.

    import exfusion_param as exf

    exf.wrap(model)  # each FFN linear becomes the weighted sum of 4 experts
    optimizer = torch.optim.AdamW(exf.param_groups(model, weight_decay=0.05), lr=1e-3)
    ...  # train as before
    exf.fuse(model)  # the dense model again: same classes, same keys

The method is ExFusion (Ruan et al., 2026, arXiv 2603.27965).
"""

from .api import fuse, wrap
from .config import ExFusionConfig
from .fusion_weights.token_pool import token_mask
from .measures import metrics
from .optim import no_weight_decay_names, param_groups
from .sharding.fsdp import expert_placement, fully_shard
from .state_dict import fused_state_dict, load_dense_state_dict
from .step.adamw_and_sgd import ExpertAdamW, ExpertSGD
from .summary import Summary, summarize

__version__ = "0.2.0"

__all__ = [
    "ExFusionConfig",
    "ExpertAdamW",
    "ExpertSGD",
    "Summary",
    "expert_placement",
    "fully_shard",
    "fuse",
    "fused_state_dict",
    "load_dense_state_dict",
    "metrics",
    "no_weight_decay_names",
    "param_groups",
    "summarize",
    "token_mask",
    "wrap",
]
