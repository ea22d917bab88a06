"""How much Python one step of an optimizer runs, which is what small models wait for."""

import gc
import sys
from types import FrameType

import pytest
import torch

import exfusion_param as exf
from exfusion_testing.models import FFNs


def _calls_of_step(variant: str, ffns: int) -> int:
    """The calls of Python functions in the third step of ExpertAdamW."""
    torch.manual_seed(0)
    model = FFNs(4, 6, ffns)
    exf.wrap(model, variant=variant, fuse_on="step")
    optimizer = exf.ExpertAdamW(exf.param_groups(model, weight_decay=0.05), lr=1e-3)
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    for step in range(3):
        model(torch.randn(2, 3, 4)).sum().backward()
        before = sys.getprofile()
        gc.collect()  # callbacks of what earlier tests left would count
        sys.setprofile(count if step == 2 else before)
        try:
            optimizer.step()
        finally:
            sys.setprofile(before)
        optimizer.zero_grad()
    return calls


# A dense FFN takes about 12. More than this is a loop that has come into the step.
@pytest.mark.parametrize(("variant", "most"), [("sw", 60), ("dw", 85), ("mb", 135)])
def test_calls_of_a_step_for_each_ffn(variant: str, most: int) -> None:
    few, many = _calls_of_step(variant, 2), _calls_of_step(variant, 10)
    assert (many - few) / 8 <= most
