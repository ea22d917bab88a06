"""Hypothesis profiles, and what every test starts from."""

import os

import hypothesis
import pytest
import torch

COMMON = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("dev", max_examples=10, **COMMON)
hypothesis.settings.register_profile("ci", max_examples=40, derandomize=True, **COMMON)
hypothesis.settings.register_profile("nightly", max_examples=1000, **COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

torch.set_num_threads(1)  # the tests run in as many processes as there are cores
os.environ["OMP_NUM_THREADS"] = "1"  # in what tests start, too
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else each worker starts processes for it
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
