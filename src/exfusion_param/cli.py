"""The command line `exfusion`; needs the extra `cli`, and the libraries of a command's input.

`exfusion --tyro-print-completion bash` prints shell completion.
"""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from . import __version__
from .checkpoint import fuse_checkpoint
from .checkpoint.dense.fusing import SHARD_BYTES
from .config import ExFusionConfig, Variant
from .study import run as run_study
from .study.rates import Better
from .study.user_code import functions_of
from .summary import summarize

try:
    import tyro
except ModuleNotFoundError as error:
    raise SystemExit('exfusion: tyro is missing. Run: pip install "exfusion_param[cli]"') from error


class UsageError(Exception):
    """An error that the command line reports to the user, without a traceback."""


def inspect(
    model: Annotated[str, tyro.conf.Positional],
    config: Annotated[ExFusionConfig, tyro.conf.OmitArgPrefixes] = ExFusionConfig(),  # noqa: B008
    filter_globs: Annotated[tuple[str, ...], tyro.conf.arg(name="filter")] = (),
) -> None:
    """List what wrap() would do to a model: FFN groups, linears, shapes, parameters and bytes.

    The model is built on the meta device: nothing is downloaded, and no memory is allocated.

        exfusion inspect timm:swin_tiny_patch4_window7_224
        exfusion inspect transformers:DIR --num-experts 8 --variant dw
        exfusion inspect timm:deit_tiny_patch16_224 --filter "*.attn.proj" "*.mlp.*"

    Args:
        model: `timm:NAME`, or `transformers:DIR` for a folder with a config.json.
        config: the settings of ExFusion.
        filter_globs: globs for the names of the linears to wrap, instead of the FFNs that are found
            automatically.
    """
    print(summarize(_load(model), config, filter_fn=list(filter_globs) or None))


def fuse(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Fuse a wrapped checkpoint on disk into a dense one, in safetensors.

    The model is not built; memory holds one file of the dense model and a few tens of MiB. The
    checkpoint needs a config.json that records how the model was wrapped. The callbacks for
    transformers and Lightning write it, or exfusion_param.checkpoint.save_config(model, folder).

        exfusion fuse runs/trainer/checkpoint-128 dense
        exfusion fuse runs/lightning/last.ckpt dense.safetensors

    Args:
        checkpoint: a folder with model.safetensors, pytorch_model.bin or shards with their index,
            or one such file; torch files are loaded with weights_only=True.
        out: a new folder, for model.safetensors, or for several files and their index if it would
            be larger than shard-bytes; or a new file that ends in .safetensors. It appears only
            when it is complete.
        shard_bytes: the largest size of a file.
    """
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:

        def progress(written: int, total: int) -> None:
            bar.total = total
            bar.update(written)

        path = fuse_checkpoint(checkpoint, out, shard_bytes=shard_bytes, progress=progress)
    print(path)


def plot(
    run_dir: Annotated[Path, tyro.conf.Positional],
    out: Path | None = None,
) -> None:
    """Draw a run's metrics.csv: fusion weights, entropy, distances, bank mass, router load.

    Its rows are `{"step": step} | exfusion_param.metrics(model)`, as the examples, the callbacks
    and Lightning's CSVLogger write them.

        exfusion plot runs/quickstart
        exfusion plot runs/quickstart --out plots

    Args:
        run_dir: the folder with metrics.csv.
        out: the folder for the PNG files; run_dir by default.
    """
    from .history import read_history

    path = run_dir / "metrics.csv"
    if not path.is_file():
        raise UsageError(f"{run_dir} has no metrics.csv. Write it with history.append_row.")
    import matplotlib as mpl

    mpl.use("Agg")
    from .plotting import write_plots

    try:
        history = read_history(path)
    except csv.Error as error:
        raise UsageError(f"{path} is not a CSV file: {error}") from error
    folder = out or run_dir
    folder.mkdir(parents=True, exist_ok=True)
    print(*write_plots(history, folder), sep="\n")


def study(
    train: Annotated[str, tyro.conf.Positional],
    build: str = "build",
    config: Annotated[ExFusionConfig, tyro.conf.OmitArgPrefixes] = ExFusionConfig(),  # noqa: B008
    variants: tuple[Variant, ...] = ("sw", "dw", "mb"),
    out: Path = Path("study"),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    rates: tuple[float, ...] = (),
    tuning_seeds: tuple[int, ...] = (1000, 1001),
    better: Better = "more",
    at_once: int = 1,
    metric: str = "metric",
) -> None:
    """Compare dense training, the control and the variants on your own task.

    Your module has a function that builds the dense model, and one that trains and tests it:
    `train(model, seed) -> metric`, or `train(model, seed, lr)` with --rates. docs/study.md has an
    example. If a study was interrupted, the same command resumes it.

        exfusion study my_task:train
        exfusion study my_task:train --rates 1e-3 3e-3 --at-once 2 --metric loss --better less

    Args:
        train: `MODULE:FUNCTION`, with a module in the current folder or an installed one.
        build: the function of the same module that builds the dense model.
        config: the settings of the variants, except for variant and seed.
        variants: the variants to compare with the control.
        out: the folder for records, table and plot.
        seeds: seeds of the compared runs.
        rates: learning rates; each arm uses the best of them.
        tuning_seeds: seeds of the runs that choose rates.
        better: whether more or less of the metric is better.
        at_once: the number of parallel processes.
        metric: the name of the metric in the table, with its unit.
    """
    sys.path.insert(0, str(Path.cwd()))
    try:
        run_study(
            *functions_of(train, build),
            out=out,
            config=config,
            variants=variants,
            seeds=seeds,
            rates=rates,
            tuning_seeds=tuning_seeds,
            better=better,
            at_once=at_once,
            metric=metric,
        )
    except RuntimeError as error:  # some runs failed
        raise UsageError(" ".join(str(error).split())) from error


def _load(name: str) -> nn.Module:
    library, _, rest = name.partition(":")
    loaders = {"timm": _load_timm, "transformers": _load_transformers}
    if library not in loaders or not rest:
        raise UsageError(f"model must be timm:NAME or transformers:DIR, got {name!r}.")
    try:
        with torch.device("meta"):
            return loaders[library](rest)
    except (UsageError, ModuleNotFoundError):
        raise
    except Exception as error:  # whatever a library makes of a name or of a config.json
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{name} cannot be built: {reason}") from error


def _load_timm(name: str) -> nn.Module:
    import timm

    if not timm.is_model(name):
        close = timm.list_models(f"*{name.partition('_')[0]}*")[:5]
        similar = f"Similar names: {', '.join(close)}." if close else "timm.list_models() has all."
        raise UsageError(f"timm has no model {name!r}. {similar}")
    return timm.create_model(name)


def _load_transformers(folder: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    if not Path(folder, "config.json").is_file():
        raise UsageError(f"{folder} is not a folder with a config.json.")
    trusted: Any = {"trust_remote_code": False}  # the folder's code is not run
    config = AutoConfig.from_pretrained(folder, local_files_only=True, **trusted)
    return AutoModel.from_config(config, **trusted)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit with 0, 1 and a message, or 2 for invalid arguments."""
    if (sys.argv[1:] if arguments is None else arguments) == ["--version"]:
        print(f"exfusion_param {__version__}")
        return
    commands: dict[str, Callable[..., None]] = {
        "inspect": inspect,
        "fuse": fuse,
        "plot": plot,
        "study": study,
    }
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            tyro.extras.subcommand_cli_from_dict(commands, prog="exfusion", args=arguments)
    except (UsageError, ValueError, TypeError, OSError) as error:
        sys.exit(f"exfusion: {str(error).splitlines()[0]}")
    except ModuleNotFoundError as error:
        sys.exit(f"exfusion: {error.name} is not installed. Run: pip install {error.name}")
    except KeyboardInterrupt:
        sys.exit(130)


def _show_warning(message: Warning | str, *place: object, **more: object) -> None:
    print(f"exfusion: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
