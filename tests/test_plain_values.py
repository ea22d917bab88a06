"""What is not a tensor goes through JSON and comes back the same."""

import contextlib
import json
from collections import Counter
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from exfusion_param.checkpoint import CheckpointError
from exfusion_param.checkpoint.files.plain_values import join, same, split

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
leaves = plain | st.sampled_from([torch.float32, torch.bfloat16, torch.int8])
nested = st.recursive(
    leaves | st.builds(lambda size: torch.arange(size) / 3, st.integers(0, 4)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3)
        | st.sets(st.integers(), max_size=3)
        | st.builds(Counter, st.dictionaries(st.text(max_size=3), st.integers(), max_size=3))
    ),
    max_leaves=12,
)


@given(value=nested)
def test_plain_values_survive_json(value: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(split(value, "x", tensors), allow_nan=False)
    back = join(json.loads(text), tensors)
    assert type(back) is type(value)
    assert same(back, value)


@given(value=st.recursive(plain, lambda v: st.lists(v) | st.dictionaries(st.text(), v)))
def test_malformed_values_are_refused_or_plain(value: Any) -> None:
    for mark in ("tensor", "quantized", "float", "bytes", "dtype", "tuple", "dict", "no such"):
        with contextlib.suppress(CheckpointError):
            join({"__is__": mark, "value": value}, {})
