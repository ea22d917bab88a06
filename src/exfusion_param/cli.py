"""The command line `exfusion`; needs tyro, and the library that a model comes from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import nn

from .config import ExFusionConfig
from .summary import summarize


class UsageError(Exception):
    """What the user asked for cannot be done; its message is for them."""


def inspect(
    model: Annotated[str, tyro.conf.Positional],
    config: Annotated[ExFusionConfig, tyro.conf.OmitArgPrefixes] = ExFusionConfig(),  # noqa: B008
    filter_globs: Annotated[tuple[str, ...], tyro.conf.arg(name="filter")] = (),
) -> None:
    """Print what wrap() would do to a model: groups, linears, shapes, parameters and bytes.

    The model is built on the meta device: nothing is downloaded, and no memory is taken.

        exfusion inspect timm:swin_tiny_patch4_window7_224
        exfusion inspect transformers:DIR --num-experts 8 --variant dw
        exfusion inspect timm:deit_tiny_patch16_224 --filter "*.attn.proj" "*.mlp.*"

    Args:
        model: `timm:NAME`, or `transformers:DIR` for a folder with a config.json.
        config: the settings of ExFusion.
        filter_globs: globs for the names of the linears, instead of the FFNs that are found.
    """
    print(summarize(_load(model), config, filter_fn=list(filter_globs) or None))


def _load(name: str) -> nn.Module:
    library, _, rest = name.partition(":")
    loaders = {"timm": _load_timm, "transformers": _load_transformers}
    if library not in loaders or not rest:
        raise UsageError(f"A model is timm:NAME or transformers:DIR, got {name!r}.")
    with torch.device("meta"):
        return loaders[library](rest)


def _load_timm(name: str) -> nn.Module:
    import timm

    if not timm.is_model(name):
        close = timm.list_models(f"*{name.partition('_')[0]}*")[:5]
        raise UsageError(f"timm has no model {name!r}. Some that it has: {', '.join(close)}.")
    return timm.create_model(name)


def _load_transformers(folder: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    if not Path(folder, "config.json").is_file():
        raise UsageError(f"{folder} is no folder with a config.json.")
    try:
        return AutoModel.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    except (ValueError, KeyError) as error:
        raise UsageError(f"{folder}/config.json: {str(error).splitlines()[0]}") from error


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit status 0, 1 with a message, or 2 for arguments that do not fit."""
    commands = {"inspect": inspect}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="exfusion", args=arguments)
    except (UsageError, ValueError, TypeError) as error:
        sys.exit(f"exfusion: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"exfusion: {error.name} is not installed; pip install {error.name}.")


if __name__ == "__main__":
    main()
