"""The settings of an ExFusion parametrization."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from .expert_config import ExpertConfig, FuseOn, check_type

Variant = Literal["sw", "dw", "mb"]
BankInit = Literal["zeros", "uniform"]

_CHOICES = {
    "variant": get_args(Variant),
    "bank_init": get_args(BankInit),
    "fuse_on": get_args(FuseOn),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExFusionConfig(ExpertConfig):
    """What `wrap` attaches to a model. Immutable, checked when it is made.

    The defaults are the paper's: memory bank, 4 experts, momentum 0.95 (arXiv 2603.27965).

    Args:
        variant: where the fusion weights come from. `"sw"`: fixed at 1/N (Eq. 8); `"dw"`: a learned
            vector for each FFN group (Eq. 9); `"mb"`: a router's mean output, averaged over steps
            in a memory bank (Eq. 10, 11).
        num_experts: N, the experts of each linear, at least 2.
        momentum: delta of the memory bank, in [0, 1).
        shared_router: one router for each FFN group, on the FFN's input; otherwise one for each
            linear, on that linear's own input (Table IX). `"mb"` only.
        expert_init: `"independent"`: expert 0 keeps the model's own weight, the others have its
            rows and columns in random order, so the same distribution and singular values;
            `"upcycle"`: every expert is the model's weight plus noise that leaves the fused weight
            as it was, for pretrained models; `"drop_upcycle"`: every expert is the model's weight,
            but for a share of the FFN's hidden units that are drawn again (arXiv 2502.19261).
        upcycle_noise: standard deviation of that noise, as a share of the weight's own.
        drop_ratio: share of the hidden units that each expert redraws, in (0, 1].
        token_stride: the router reads the first of every so many tokens of a sample; 1 reads all
            tokens, as in the paper. A router of many experts costs that much less. `"mb"` only.
        bank_init: `"zeros"` (the paper: a warm-up, for training from scratch) or `"uniform"` (1/N,
            needed for pretrained weights). `"mb"` only.
        fuse_on: when the weights are fused: `"forward"`, at each use, as in the paper; `"step"`,
            once for each step of the optimizer: the model stays dense, with the experts in the
            optimizer's state.
        layers: indices of the FFN groups to wrap, in the order of the model; negative ones count
            from the end; None wraps all (Table X).
        seed: makes the experts and routers reproducible; None draws on torch's global generator.

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
        for name, choices in _CHOICES.items():
            self._check_choice(name, choices)
        super().__post_init__()
        check_type("momentum", self.momentum, int, float)
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"momentum must be in [0, 1), got {self.momentum}. "
                "The paper uses 0.95; 0 uses each step's own fusion weights."
            )
        if not isinstance(self.shared_router, bool):
            raise TypeError(f"shared_router must be a bool, got {self.shared_router!r}.")
        check_type("token_stride", self.token_stride, int)
        if self.token_stride < 1:
            raise ValueError(
                f"token_stride must be >= 1, got {self.token_stride}. 1 reads all tokens."
            )

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
