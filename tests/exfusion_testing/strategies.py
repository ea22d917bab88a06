"""Random shapes and settings."""

from typing import Any

from hypothesis import strategies as st

from exfusion_param import ExFusionConfig

sizes = st.integers(1, 6)
hidden_sizes = st.integers(4, 9)  # more than half of any of those, as FFNs have
num_experts = st.integers(2, 5)
variants = st.sampled_from(["sw", "dw", "mb"])
momenta = st.sampled_from([0.0, 0.5, 0.95])
seeds = st.integers(0, 2**31 - 1)


def configs(**fixed: Any) -> st.SearchStrategy[ExFusionConfig]:
    """Any config, with some fields fixed."""
    fields = {
        "variant": variants,
        "num_experts": num_experts,
        "momentum": momenta,
        "shared_router": st.booleans(),
        "token_stride": st.sampled_from([1, 1, 3]),
        "expert_init": st.just("independent"),
        "bank_init": st.sampled_from(["zeros", "uniform"]),
        "seed": seeds,
    }
    given = {name: st.just(value) for name, value in fixed.items()}
    return st.builds(ExFusionConfig, **(fields | given))
