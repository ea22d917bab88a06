"""What the recipes compare: ways to make a dense model ready for training."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

import exfusion_param as exf
from support import diversity, mixture

Name = Literal[
    "exfusion",
    "dense",
    "control",
    "small-init",
    "moe",
    "subspace",
    "subspace-network",
    "subspace-cosine",
    "subspace-near",
    "around-bank",
    "partitioned",
    "expert-lr",
    "noise",
]

NEAR = 10.0  # concentration of draws around the mid-point
BALANCE = 0.01  # weight of the mixture's balance loss, as in Switch


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


def _nothing(model: nn.Module) -> dict[str, float]:
    return {}


class Method(NamedTuple):
    """A model in training.

    Args:
        model: to train.
        ship: the model as it is shipped; called once, after training.
        metrics: of the model, to log.
        extra_loss: added to the loss of each micro-batch.
        after_step: called with the model after each of the optimizer's steps.
    """

    model: nn.Module
    ship: Callable[[nn.Module], nn.Module] = _as_it_is
    metrics: Callable[[nn.Module], dict[str, float]] = _nothing
    extra_loss: Callable[[nn.Module], Tensor] | None = None
    after_step: Callable[[nn.Module], None] | None = None


def prepare(name: Name, dense: nn.Module, config: exf.ExFusionConfig) -> Method:
    """Make a model ready for training by a method, in place.

    - `exfusion`: wrapped.
    - `dense`: as it is.
    - `control`: dense, from the mean of the experts that ExFusion starts from. It has what a mean
      of N draws gives, a smaller deviation, and nothing else.
    - `small-init`: dense, its own draw of the FFNs' linears divided by the square root of N. It
      has that deviation without a mean being taken.
    - `moe`: MoE-N-1, each token through one of N FFNs, of the same experts. It is shipped as it is.
    - the others: candidates that could make the experts differ (diversity.py).

    Args:
        name: of the method.
        dense: the model.
        config: of ExFusion; its seed draws the experts.
    """
    if name == "exfusion":
        return Method(exf.wrap(dense, config), exf.fuse, exf.metrics)
    if name == "control":
        averaged = mixture.with_experts(dense, config)
        dense.load_state_dict(exf.fused_state_dict(averaged))
    elif name == "small-init":
        _shrink(dense, config)
    elif name == "moe":
        model = mixture.replace_ffns(dense, config)
        return Method(model, extra_loss=lambda m: BALANCE * mixture.balance_loss(m))
    elif name != "dense":
        return _candidate(name, dense, config)
    return Method(dense)


def _candidate(name: Name, dense: nn.Module, config: exf.ExFusionConfig) -> Method:
    if name == "partitioned":
        model = diversity.partitioned(dense, config)
        return Method(model, diversity.merged, after_step=diversity.share)
    if name.startswith("subspace"):
        concentration = NEAR if name == "subspace-near" else 1.0
        model = diversity.subspace(dense, config, concentration, name == "subspace-network")
        extra = diversity.cosine if name == "subspace-cosine" else None
        return Method(model, exf.fuse, exf.metrics, extra)
    if name == "around-bank":
        return Method(diversity.around_bank(dense, config, NEAR), exf.fuse, exf.metrics)
    model = exf.wrap(dense, config, fuse_on="forward")
    after = diversity.ExpertRates(model) if name == "expert-lr" else diversity.add_noise
    return Method(model, exf.fuse, exf.metrics, after_step=after)


@torch.no_grad()
def _shrink(dense: nn.Module, config: exf.ExFusionConfig) -> None:
    """Divide the FFNs' linears by the square root of N."""
    for linear in exf.summarize(dense, config).linears:
        for parameter in dense.get_submodule(linear.name).parameters():
            parameter.div_(config.num_experts**0.5)
