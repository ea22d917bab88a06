"""ExFusionConfig refuses what it cannot mean, and survives JSON."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given

from exfusion_param import ExFusionConfig
from exfusion_testing.strategies import configs


@given(config=configs())
def test_to_dict_and_from_dict_are_inverse_through_json(config: ExFusionConfig) -> None:
    assert ExFusionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_layers_survive_json_as_a_tuple() -> None:
    config = ExFusionConfig(layers=[0, -1])  # type: ignore[arg-type]
    assert config.layers == (0, -1)
    assert ExFusionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_experts": 1}, ValueError, "num_experts must be >= 2, got 1. Use the dense model"),
        ({"num_experts": 4.0}, TypeError, "num_experts must be int, got 4.0"),
        ({"num_experts": True}, TypeError, "num_experts must be int, got True"),
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, ValueError, r"momentum must be in \[0, 1\), got -0.1"),
        ({"momentum": float("nan")}, ValueError, r"momentum must be in \[0, 1\), got nan"),
        ({"momentum": "0.9"}, TypeError, "momentum must be int or float, got '0.9'"),
        ({"variant": "xx"}, ValueError, "variant must be one of sw, dw, mb, got 'xx'"),
        ({"expert_init": "copy"}, ValueError, "expert_init must be one of independent, upcycle"),
        ({"bank_init": "ones"}, ValueError, "bank_init must be one of zeros, uniform"),
        ({"fuse_on": "never"}, ValueError, "fuse_on must be one of forward, step, got 'never'"),
        ({"upcycle_noise": -1}, ValueError, "upcycle_noise must be >= 0 and finite, got -1"),
        ({"upcycle_noise": float("inf")}, ValueError, "upcycle_noise must be >= 0 and finite"),
        ({"drop_ratio": 0}, ValueError, r"drop_ratio must be in \(0, 1\], got 0. .*upcycle"),
        ({"shared_router": 1}, TypeError, "shared_router must be a bool, got 1"),
        ({"token_stride": 0}, ValueError, "token_stride must be >= 1, got 0. 1 reads all tokens"),
        ({"token_stride": 2.0}, TypeError, "token_stride must be int, got 2.0"),
        ({"layers": 3}, TypeError, "layers must be a sequence of ints or None, got 3"),
        ({"layers": "01"}, TypeError, "layers must be a sequence of ints or None, got '01'"),
        ({"layers": ()}, ValueError, "layers must name at least one FFN group"),
        ({"layers": (1, 1)}, ValueError, r"each once, got \[1, 1\]"),
        ({"layers": (1.5,)}, TypeError, "layers must be int, got 1.5"),
        ({"seed": "a"}, TypeError, "seed must be int, got 'a'"),
    ],
)
def test_bad_fields_are_named_with_the_rule(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ExFusionConfig(**fields)


def test_unknown_fields_are_named() -> None:
    with pytest.raises(TypeError, match="ExFusionConfig has no field experts"):
        ExFusionConfig.from_dict({"experts": 4})


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ExFusionConfig().num_experts = 8  # type: ignore[misc]
