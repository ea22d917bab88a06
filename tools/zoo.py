"""Every model of timm and every model type of transformers, built on the meta device.

Models have the widths of their published sizes; those of transformers have at most four layers in
each stack where their config allows it, which leaves out repetitions only.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import timm
import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

LAYERS = 4
DEPTHS = {"num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "n_layer"}
DEPTHS |= {"n_layers", "num_decoder_layers", "num_encoder_layers", "depth"}
PER_LAYER = {"layer_types", "mlp_layer_types", "attention_types"}


def names() -> list[tuple[str, str]]:
    """All models, as (library, name), each library's by name."""
    ours = [("timm", name) for name in sorted(timm.list_models())]
    return ours + [("transformers", name) for name in sorted(CONFIG_MAPPING_NAMES)]


def build(library: str, name: str) -> nn.Module:
    """A model on the meta device.

    Raises:
        Exception: whatever the library raises where it cannot build the model so.
    """
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        if library == "timm":
            return timm.create_model(name)
        try:
            return _of_type(_shallow(transformers.AutoConfig.for_model(name)))
        except Exception:  # it does not allow fewer layers; what else is wrong is raised below
            return _of_type(transformers.AutoConfig.for_model(name))


def _of_type(config: Any) -> nn.Module:
    """The model without a head if there is one, otherwise the first that takes the config."""
    errors: list[Exception] = []
    for cls in _classes_for(config):
        try:
            return cls._from_config(config)
        except Exception as error:
            errors.append(error)
    raise errors[0] if errors else ValueError(f"no model takes a {type(config).__name__}")


def _classes_for(config: Any) -> Iterator[type[transformers.PreTrainedModel]]:
    """The model class that `AutoModel` takes, then those beside the config, the largest last."""
    with contextlib.suppress(KeyError, ValueError):
        mapping: Any = transformers.AutoModel._model_mapping
        yield mapping[type(config)]
    path = type(config).__module__.replace(".configuration_", ".modeling_")
    for cls in vars(importlib.import_module(path)).values():
        is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
        if is_model and cls.config_class is type(config):
            yield cls


def _shallow(config: Any) -> Any:
    """The config with at most four layers in each stack, and so those within it."""
    for field, value in list(vars(config).items()):
        if field in DEPTHS and isinstance(value, int) and value > LAYERS:
            setattr(config, field, LAYERS)
        elif field in PER_LAYER and isinstance(value, list):
            setattr(config, field, value[:LAYERS])
        elif isinstance(value, transformers.PreTrainedConfig):
            _shallow(value)
    return config
