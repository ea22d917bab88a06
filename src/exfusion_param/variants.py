"""Which fusion weights each variant of ExFusion has."""

from __future__ import annotations

from .config import ExFusionConfig
from .finding.discovery import FFNGroup
from .finding.projections import projection_of
from .fusion_weights import FusionWeights, LearnedWeights, StaticWeights
from .memory_bank import MemoryBank
from .tensors.expert_starts import named_generator
from .tensors.precision import accumulation_dtype


def fusion_weights_for(group: FFNGroup, config: ExFusionConfig, seed: int) -> FusionWeights:
    """The fusion weights of the config's variant for linears that share them.

    Args:
        group: the linears.
        config: the settings.
        seed: of the router's draws.
    """
    linears = tuple(group.linears.values())
    first = next(iter(group.linears)).removeprefix(group.name).lstrip(".")
    shared = (group.name, first, config, linears)
    weight, projection = linears[0].get_parameter("weight"), projection_of(linears[0])
    assert projection is not None
    device, dtype = weight.device, accumulation_dtype(weight.dtype)
    if config.variant == "sw":
        return StaticWeights(*shared)
    if config.variant == "dw":
        return LearnedWeights(*shared, device=device, dtype=dtype)
    return MemoryBank(
        *shared,
        in_features=projection.in_features,
        device=device,
        dtype=dtype,
        generator=named_generator(seed, f"{group.name}.router", device),
    )
