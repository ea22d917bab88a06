"""The arms of a user's model: dense, control, and the variants."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from ..api import fuse, wrap
from ..atomic_files import write_file
from ..config import ExFusionConfig, Variant
from .comparison import Comparison, compare
from .figure import plot
from .rates import Better
from .runs import Numbers, Run, as_numbers, remembered

Build = Callable[[], nn.Module]
Train = Callable[..., Numbers]

OPTIONAL = ("lr", "length", "tuning")
"""Parameters that `train` receives by keyword, if it has them."""


def run(
    build: Build,
    train: Train,
    *,
    out: str | Path,
    config: ExFusionConfig | None = None,
    variants: Sequence[Variant] = ("sw", "dw", "mb"),
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    rates: Sequence[float] = (),
    tuning_seeds: Sequence[int] = (1000, 1001),
    better: Better = "more",
    at_once: int = 1,
    metric: str = "metric",
) -> Comparison:
    """Train a model dense, as the control, and with each variant, and compare the results.

    All arms start from the same model in each seed: torch's generator is seeded before `build()`
    and again before `train(...)`; seed other generators in `train`. Finished runs are recorded in
    `out/runs`, and the same call does only the runs that are missing. The table and a sentence
    about significance are printed and written to `out/study.md`, and a plot to `out/study.svg` if
    matplotlib is installed.

    Args:
        build: returns the dense model.
        train: `train(model, seed)` trains and tests the model, and returns the metric, or a dict of
            numbers with the key "metric". It creates the optimizer. It may have these parameters:
            `lr`, the learning rate; `length`, a factor for the number of steps (for a control that
            trains as long as the last variant takes); `tuning`, true if the run only chooses a
            rate, and should be tested on other data.
        out: the folder of the study.
        config: the settings of all variants, except for `variant` and `seed`.
        variants: the variants to compare with the control.
        seeds: seeds of the compared runs; differences are taken seed by seed.
        rates: learning rates; each arm uses the best of them.
        tuning_seeds: seeds of the runs that choose rates.
        better: whether "more" of the metric is better, or "less", as for a loss.
        at_once: the number of parallel processes, which share the cores, or get one GPU each. They
            import `build` and `train`, which must be defined at the top level of a module.
        metric: the name of the metric in the table, with its unit.

    Returns:
        All results; `difference(arm)` is an arm's difference from the control.

    Raises:
        RuntimeError: some runs failed. The others are kept, and the same call starts only these.
        TypeError: `train` has no parameter for a rate, or does not return a number.
        ValueError: `out` holds a study with another config, or an argument is out of range.

    Example:
        >>> def build():
        ...     return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        >>> def train(model, seed):
        ...     x = torch.randn(64, 4)
        ...     optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ...     for _ in range(5):
        ...         (model(x) - x).square().mean().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...     return (model(x) - x).square().mean()
        >>> found = run(build, train, out="study", variants=["sw"], seeds=(0, 1), better="less")
        | arm | metric, 2 seeds | minus control | time, control = 1 |
        ...
        >>> list(found.results)
        ['dense', 'control', 'sw']
    """
    config = ExFusionConfig.resolve(config, {})
    for variant in variants:
        if variant not in get_args(Variant):
            raise ValueError(f"variants are {', '.join(get_args(Variant))}, got {variant!r}.")
    if not variants:
        raise ValueError("variants must name at least one, got none.")
    trial = ModelTrial(build, train, config, _accepted(train, rates))
    folder = Path(out)
    _warn_of_changed_code(folder, trial)
    found = compare(
        trial,
        {arm: arm for arm in ("dense", "control", *variants)},
        control="control",
        out=folder,
        seeds=seeds,
        rates=rates,
        tuning_seeds=tuning_seeds,
        better=better,
        equal_time=variants[-1] if "length" in trial.keywords else None,
        at_once=at_once,
        metric=metric,
        settings={k: v for k, v in config.to_dict().items() if k not in ("variant", "seed")},
    )
    if "length" not in trial.keywords:
        note = (
            "Equal steps only: equal time needs a parameter `length` of the function that trains."
        )
        found = dataclasses.replace(found, notes=[*found.notes, note])
    _write(found, folder)
    return found


@dataclasses.dataclass(frozen=True)
class ModelTrial:
    """Builds, prepares and trains a model; goes to other processes."""

    build: Build
    train: Train
    config: ExFusionConfig
    keywords: tuple[str, ...]

    def __call__(self, run: Run) -> Numbers:
        """One run; its seconds are those of `train`."""
        torch.manual_seed(run.seed)
        model = prepare(self.build(), run.arm, self.config.replace(seed=run.seed))
        torch.manual_seed(run.seed)  # the same whatever was drawn before
        given = {name: getattr(run, name) for name in self.keywords}
        start = time.perf_counter()
        found = as_numbers(self.train(model, run.seed, **given))
        return {"seconds": time.perf_counter() - start} | found


def prepare(model: nn.Module, arm: str, config: ExFusionConfig) -> nn.Module:
    """Make a dense model an arm, in place; the control has the mean of the variants' draws."""
    if arm == "dense":
        return model
    if arm == "control":
        return fuse(wrap(model, config.replace(variant="sw", fuse_on="forward")))
    return wrap(model, config.replace(variant=arm))


def _accepted(train: Train, rates: Sequence[float]) -> tuple[str, ...]:
    """Which of OPTIONAL the function has parameters for."""
    parameters = inspect.signature(train).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    keywords = [name for name in OPTIONAL if takes_all or name in names]
    if rates and "lr" not in keywords:
        raise TypeError(
            f"rates {list(rates)} are given, but {_name(train)} has no parameter lr. "
            "Add one, as in train(model, seed, lr)."
        )
    if not rates and "lr" in keywords:
        keywords.remove("lr")  # its default, if it has one
    try:
        inspect.signature(train).bind(None, 0, **dict.fromkeys(keywords))
    except TypeError as error:
        raise TypeError(
            f"{_name(train)} is called as train(model, seed), and with lr if there are rates "
            f"(got {list(rates)}), but: {error}."
        ) from error
    return tuple(keywords)


def _warn_of_changed_code(folder: Path, trial: ModelTrial) -> None:
    code = {_name(function): _digest(function) for function in (trial.build, trial.train)}
    if remembered(folder / "code.json", code) != code:
        warnings.warn(
            f"{' or '.join(code)} has changed since {folder} was created. Finished runs are "
            "not repeated: use another folder for out if that matters.",
            stacklevel=3,
        )


def _name(function: Callable[..., object]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _digest(function: Callable[..., object]) -> str:
    try:
        return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]
    except (OSError, TypeError):  # typed in, or an object
        return ""


def _write(found: Comparison, folder: Path) -> None:
    print(found)
    write_file(folder / "study.md", f"{found}\n".encode())
    values = {arm: found.values(arm) for arm in found.results}
    try:
        plot(folder / "study.svg", values, found.control, found.metric)
    except ModuleNotFoundError as error:
        print(f"No plot: {error.name} is not installed. Run: pip install {error.name}")
