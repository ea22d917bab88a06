"""Files that a run leaves behind: plots and report.html."""

import base64
import itertools
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib.pyplot as plt
import timm
import torch
from torch import Tensor

import exfusion_param as exf
from exfusion_param import plotting
from exfusion_param.history import History, read_history
from support import accuracies

PLOTS = {
    "loss": ("Training loss of each run.", "run"),
    "accuracy": ("Test accuracy of each run after each epoch.", "run"),
    "fusion_weights": ("Fusion weights of the experts in each FFN group.", "expert"),
    "effective_experts": (
        "Effective number of experts: all of them if their fusion weights are equal, "
        "1 if one expert takes all.",
        "FFN group",
    ),
    "entropy": (
        "Entropy of the fusion weights: the logarithm of the effective number of experts.",
        "FFN group",
    ),
    "expert_distance": (
        "Distance of the experts' weights from their mean, as a share of that mean.",
        "FFN group",
    ),
    "bank_mass": (
        "Mass of the memory bank: the sum of its fusion weights. A bank that starts from zeros "
        "fills up to 1.",
        "FFN group",
    ),
}
"""By the name of each plot's file its caption, and what a line in it stands for."""


class Result(NamedTuple):
    """What a run has come to.

    Args:
        run: its name.
        is_right: whether it classifies each test image rightly.
        step_ms: median time of a step.
        training_parameters: parameters in training.
        shipped_parameters: parameters of the model that is shipped.
    """

    run: str
    is_right: Tensor
    step_ms: float
    training_parameters: int
    shipped_parameters: int

    @property
    def accuracy(self) -> float:
        """Test accuracy in percent."""
        return accuracies.accuracy(self.is_right)

    @property
    def error(self) -> float:
        """Standard error of the test accuracy, in percentage points."""
        return accuracies.standard_error(self.is_right)


def table(results: Sequence[Result]) -> str:
    """The results as lines of text."""
    header = f"{'run':10}{'test accuracy':>15}{'step time':>11}{'in training':>13}{'shipped':>10}"
    lines = [
        f"{result.run:10}{result.accuracy:13.2f} %{result.step_ms / results[0].step_ms:11.2f}"
        f"{result.training_parameters:13,}{result.shipped_parameters:10,}"
        for result in results
    ]
    return "\n".join([header, *lines])


def differences(results: Sequence[Result]) -> dict[str, accuracies.Difference]:
    """The differences between the accuracies of any two runs, by "later minus earlier"."""
    return {
        f"{ours.run} minus {theirs.run}": accuracies.Difference.of(ours.is_right, theirs.is_right)
        for theirs, ours in itertools.combinations(results, 2)
    }


def flatten(settings: dict[str, Any]) -> dict[str, str]:
    """Settings without groups, as a reader takes them."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        flat |= flatten(value) if isinstance(value, dict) else {name: _shown(value)}
    return flat


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not set" if value is None else str(value)


def environment() -> dict[str, str]:
    """Hardware and versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "hardware": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "exfusion_param": exf.__version__,
    }


def write_plots(folder: Path, runs: Sequence[str]) -> list[Path]:
    """Draw loss, accuracy and what the experts do from the folder's metrics.csv."""
    history = read_history(folder / "metrics.csv")
    with plt.rc_context({"figure.figsize": (4.8, 3.4), "font.size": 12}):  # legible on a phone
        loss = _write_curves(folder, history, "loss", "training loss", runs)
        accuracy = _write_curves(folder, history, "accuracy", "test accuracy, %", runs)
        return [loss, accuracy, *plotting.write_plots(history, folder)]


def _write_curves(
    folder: Path, history: History, column: str, label: str, runs: Sequence[str]
) -> Path:
    histories = {run: {"step": history["step"], column: history[f"{column}/{run}"]} for run in runs}
    axes = plotting.curves(histories, column)
    axes.set_ylabel(label)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(runs), frameon=False)
    path = folder / f"{column}.png"
    plt.savefig(path, dpi=200)
    plt.close()
    return path


def _figure(plot: Path) -> dict[str, str]:
    caption, line = PLOTS[plot.stem]
    what = plot.stem.replace("_", " ")
    return {
        "name": plot.stem,
        "image": base64.b64encode(plot.read_bytes()).decode(),
        "alt": f"Line plot of the {what} over the steps of training, a line for each {line}",
        "caption": caption,
    }


def write_report(
    folder: Path, results: Sequence[Result], check: str, settings: dict[str, Any]
) -> Path:
    """Write report.html, which holds the results, what they mean, and the plots in one file."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = templates.get_template("report.html.jinja").render(
        results=results,
        step_times=[result.step_ms / results[0].step_ms for result in results],
        differences=differences(results),
        check=check,
        settings=flatten(settings),
        environment=environment(),
        figures=[_figure(plot) for plot in write_plots(folder, [r.run for r in results])],
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path
