"""Banks after a padded batch are those after the same tokens without padding, type by type.

The suite takes a sample of transformers' text types that changes by day; `make nightly` takes all.
"""

import copy
import datetime
import inspect
import os
import random
import re
import warnings

import pytest
import torch
from torch import nn

import exfusion_param as exf
from exfusion_testing.banks import bank_after
from exfusion_testing.small_text_models import PADDING, build, text_types

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
TODAY = datetime.datetime.now(tz=datetime.UTC).date()
MIXING = {
    "convbert": "convolutions over tokens read padding",
    "fsmt": "the decoder's attention to itself reads padding",
    "nystromformer": "landmarks of attention are means over padding as well",
    "yoso": "attention by hashes reads padding",
}
"""Types whose dense layers let padding change other tokens, by what does so."""


def sample() -> list[str]:
    types = text_types()
    return types if NIGHTLY else random.Random(TODAY.toordinal()).sample(types, 8)


def call(model: nn.Module, real: int, tokens: int) -> torch.Tensor:
    mask = (torch.arange(tokens) < real).expand(2, -1)
    ids = torch.arange(2, 14).view(2, 6)[:, :tokens].where(mask, PADDING)
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs |= {f"decoder_{name}": value for name, value in inputs.items()}
    return model(**inputs)[0]


def small(name: str) -> nn.Module:
    """A small model of a type that takes padded batches; others are skipped."""
    try:
        model = build(name)
        takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
        if model.main_input_name != "input_ids" or not takes_mask:
            pytest.skip("takes no ids with a mask")
        call(copy.deepcopy(model), 4, 6)
    except Exception as error:  # of transformers, before anything is wrapped
        pytest.skip(f"does not run at this size: {str(error)[:80]}")
    return model


@pytest.mark.parametrize("name", sample())
@pytest.mark.filterwarnings("ignore")
def test_a_padded_batch_moves_banks_as_its_tokens_do(name: str) -> None:
    model = small(name)
    try:
        exf.wrap(model, momentum=0.0, bank_init="uniform", seed=0).train()
    except ValueError as refused:
        if not re.search("is a mixture of experts already|No FFN was found", str(refused)):
            raise
        pytest.skip(str(refused)[:80])
    unpadded = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = bank_after(model, call(model, 4, 6))
    theirs = bank_after(unpadded, call(unpadded, 4, 4))
    largest = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    is_said = any("all of its tokens count" in str(each.message) for each in caught)
    assert (largest > 1e-9) == (is_said or name in MIXING), largest
