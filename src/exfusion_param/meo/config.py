"""The settings of Merging Experts into One."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from ..expert_config import ExpertConfig, check_type

Level = Literal["task", "sequence", "token"]
Gating = Literal["noisy_top_k", "softmax"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MEOConfig(ExpertConfig):
    """The settings of `meo.wrap`. Immutable, and checked on creation.

    The defaults are those of He et al., 2023 (arXiv 2310.09832): 8 experts, 4 of them merged.

    Args:
        level: what shares one merged weight. `"task"`: the entire batch, chosen by the task that
            `meo.set_task` sets; `"sequence"`: each sample, chosen by the mean of its tokens;
            `"token"`: as `"sequence"`, with a small residual block for each token before a linear.
        num_experts: N, the number of experts per linear, at least 2.
        top_k: k, the number of experts that are merged, 1 to N; None merges half of them.
        gating: `"noisy_top_k"` (Shazeer et al., arXiv 1701.06538), or `"softmax"` over all experts
            of the normalized mean, without noise, which is SMEAR (Muqeeth et al., arXiv
            2306.03745); top_k is then N.
        shared_gate: True for one gate per FFN, which reads the FFN's input; False for one gate per
            linear, which reads that linear's input.
        task_dim: the size of a task's embedding, or the number of tasks. `"task"` only.
        causal: let no token see later ones, by gating each segment by the previous one (Lory, arXiv
            2405.03133); None does so if the attention modules beside an FFN tell that they are
            causal. If only the first forward shows that, it raises, in eager mode.
        segment_length: the number of tokens per segment.
        batch_dim: the dimension of a linear's input that runs over samples; None uses the first, or
            beside an `nn.MultiheadAttention` the one given by its `batch_first`.
        balance_weight: the factor of the sum in `meo.balance_loss`.
        expert_init: as for ExFusion. Gates sum to one, so upcycled experts without noise leave what
            the model computes exactly unchanged; they separate because samples choose among them.
        upcycle_noise: standard deviation of the noise, relative to that of the weight.
        drop_ratio: the fraction of hidden units that each expert draws again, in (0, 1].
        layers: indices of the FFN groups to wrap, in the order of the model; negative indices count
            from the end; None wraps all.
        seed: makes the experts and token blocks reproducible; None uses torch's global generator.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, or two fields contradict each other.

    Examples:
        >>> config = meo.MEOConfig(level="sequence", num_experts=8, top_k=2)
        >>> config.label
        'MEO sequence, top 2'
        >>> meo.MEOConfig().kept
        4
    """

    level: Level = "sequence"
    num_experts: int = 8
    top_k: int | None = None
    gating: Gating = "noisy_top_k"
    shared_gate: bool = False
    task_dim: int | None = None
    causal: bool | None = None
    segment_length: int = 256
    batch_dim: int | None = None
    balance_weight: float = 0.01
    upcycle_noise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("level", get_args(Level))
        self._check_choice("gating", get_args(Gating))
        self._check_top_k()
        self._check_task()
        self._check_count("segment_length", 1)
        if self.batch_dim is not None:
            check_type("batch_dim", self.batch_dim, int)
            if self.batch_dim not in (0, 1):
                raise ValueError(f"batch_dim must be 0, 1 or None, got {self.batch_dim}.")
        self._check_scale("balance_weight")
        self._check_bool("shared_gate")
        if self.causal is not None:
            self._check_bool("causal")

    def _check_top_k(self) -> None:
        if self.gating == "softmax":
            if self.top_k not in (None, self.num_experts):
                raise ValueError(
                    f'gating="softmax" merges all {self.num_experts} experts, got top_k='
                    f'{self.top_k}. Leave top_k out, or use gating="noisy_top_k".'
                )
            return
        if self.top_k is None:
            return
        check_type("top_k", self.top_k, int)
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k must be from 1 to num_experts = {self.num_experts}, got {self.top_k}."
            )

    def _check_task(self) -> None:
        if (self.level == "task") != (self.task_dim is not None):
            raise ValueError(
                'level="task" needs task_dim, the number of tasks or the size of their embeddings; '
                f"no other level has one. Got level={self.level!r}, task_dim={self.task_dim!r}."
            )
        if self.task_dim is not None:
            self._check_count("task_dim", 1)
        if self.level == "task" and self.causal:
            raise ValueError('causal=True has no effect with level="task". Leave it out.')

    @property
    def kept(self) -> int:
        """k: how many experts are merged; half of them unless top_k says otherwise."""
        if self.gating == "softmax":
            return self.num_experts
        return self.top_k or max(1, self.num_experts // 2)

    @property
    def label(self) -> str:
        """The method and its level."""
        return f"MEO {self.level}, top {self.kept}"

    @property
    def shares_fusion_weights(self) -> bool:
        """Whether the linears of an FFN have one gate."""
        return self.shared_gate

    @property
    def ships_dense(self) -> bool:
        """Whether a trained model can be fused to a dense one, for each task."""
        return self.level == "task"

    @property
    def follows_inputs(self) -> bool:
        """Whether gates depend on the inputs of the linears."""
        return self.level != "task"
