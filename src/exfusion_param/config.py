"""The settings of an ExFusion parametrization."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from .expert_config import ExpertConfig, FuseOn, check_type

Variant = Literal["sw", "dw", "mb"]
BankInit = Literal["zeros", "uniform"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExFusionConfig(ExpertConfig):
    """The settings of `wrap`. Immutable, and checked on creation.

    The defaults are those of the paper: memory bank, 4 experts, momentum 0.95 (arXiv 2603.27965).

    Args:
        variant: how the fusion weights are obtained. `"sw"`: fixed at 1/N (Eq. 8); `"dw"`: a
            learned vector per FFN group (Eq. 9); `"mb"`: the mean output of a router, averaged over
            steps in a memory bank (Eq. 10, 11).
        num_experts: N, the number of experts per linear, at least 2.
        momentum: delta of the memory bank, in [0, 1).
        shared_router: True for one router per FFN group, which reads the FFN's input; False for
            one router per linear, which reads that linear's input (Table IX). `"mb"` only.
        expert_init: how the experts start. `"independent"`: expert 0 is the model's weight, the
            others are the same weight with its rows and columns permuted at random, so they have
            the same distribution and singular values. `"upcycle"`, for pretrained models: every
            expert is the model's weight plus noise that leaves the fused weight unchanged.
            `"drop_upcycle"`: every expert is the model's weight, with some hidden units of the FFN
            drawn again (arXiv 2502.19261).
        upcycle_noise: standard deviation of that noise, relative to that of the weight.
        drop_ratio: the fraction of hidden units that each expert draws again, in (0, 1].
        token_stride: the router reads the first of every `token_stride` tokens of a sample, which
            divides its cost; 1 reads all tokens, as in the paper. `"mb"` only.
        bank_init: the start of the memory bank. `"zeros"`, as in the paper: a warm-up, for training
            from scratch; `"uniform"`: 1/N, needed for pretrained weights. `"mb"` only.
        fuse_on: when the weights are fused. `"forward"`: at each use, as in the paper; `"step"`:
            once per optimizer step, so that the model stays dense, with the experts in the
            optimizer's state.
        layers: indices of the FFN groups to wrap, in the order of the model; negative indices count
            from the end; None wraps all (Table X).
        seed: makes the experts and routers reproducible; None uses torch's global generator.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value outside its range.

    Examples:
        >>> config = exf.ExFusionConfig(variant="dw", num_experts=8)
        >>> config.label
        'ExFusion dw'
        >>> model = exf.wrap(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), config)
        >>> exf.ExFusionConfig(momentum=1.0)
        Traceback (most recent call last):
        ...
        ValueError: momentum must be in [0, 1), got 1.0. ...
    """

    variant: Variant = "mb"
    momentum: float = 0.95
    shared_router: bool = True
    token_stride: int = 1
    bank_init: BankInit = "zeros"
    fuse_on: FuseOn = "forward"

    def __post_init__(self) -> None:
        self._check_choice("variant", get_args(Variant))
        self._check_choice("bank_init", get_args(BankInit))
        self._check_choice("fuse_on", get_args(FuseOn))
        super().__post_init__()
        check_type("momentum", self.momentum, int, float)
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"momentum must be in [0, 1), got {self.momentum}. "
                "The paper uses 0.95; 0 uses each step's own fusion weights."
            )
        self._check_bool("shared_router")
        self._check_count("token_stride", 1, "1 reads all tokens.")

    @property
    def label(self) -> str:
        """The method and its variant, in a word or two."""
        return f"ExFusion {self.variant}"

    @property
    def shares_fusion_weights(self) -> bool:
        """Whether the linears of an FFN have the same fusion weights."""
        return self.variant != "mb" or self.shared_router

    @property
    def follows_inputs(self) -> bool:
        """Whether fusion weights depend on the inputs of the linears."""
        return self.variant == "mb"
