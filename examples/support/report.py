"""Files that a run leaves behind: plots and report.html."""

import base64
import html
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import timm
import torch

import exfusion_param as exf
from exfusion_param import plotting
from exfusion_param.history import read_history

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse } td, th { padding: .3em 1em; border-bottom: 1px solid #ccc }
td:not(:first-child) { text-align: right } img { max-width: 100% } code { background: #eee }
"""


class Result(NamedTuple):
    """One line of the report's table."""

    run: str
    accuracy: float
    step_ms: float
    training_parameters: int
    shipped_parameters: int


def table(results: Sequence[Result]) -> str:
    """The results as lines of text."""
    header = f"{'run':10}{'test accuracy':>15}{'step time':>11}{'in training':>13}{'shipped':>10}"
    lines = [
        f"{result.run:10}{result.accuracy:13.2f} %{result.step_ms / results[0].step_ms:11.2f}"
        f"{result.training_parameters:13,}{result.shipped_parameters:10,}"
        for result in results
    ]
    return "\n".join([header, *lines])


def hardware() -> str:
    """The GPU, or the processor and how many threads torch uses of it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def write_plots(folder: Path, runs: Sequence[str]) -> list[Path]:
    """Draw loss, accuracy and what the experts do from the folder's metrics.csv."""
    history = read_history(folder / "metrics.csv")
    paths = []
    for column in ("loss", "accuracy"):
        histories = {
            run: {"step": history["step"], column: history[f"{column}/{run}"]} for run in runs
        }
        axes = plotting.curves(histories, column)
        axes.set_ylabel("training loss" if column == "loss" else "test accuracy, %")
        paths.append(folder / f"{column}.png")
        plt.savefig(paths[-1], dpi=120)
        plt.close()
    return [*paths, *plotting.write_plots(history, folder)]


def facts(check: str, settings: dict[str, Any]) -> dict[str, str]:
    """What the report says besides its table."""
    return {
        "Check": check,
        "Control": "dense, started from the mean of the experts that ExFusion starts from",
        "Settings": json.dumps(settings),
        "Hardware and versions": f"{hardware()}, torch {torch.__version__}, "
        f"timm {timm.__version__}, exfusion_param {exf.__version__}",
    }


def write_report(
    folder: Path, results: Sequence[Result], check: str, settings: dict[str, Any]
) -> Path:
    """Write report.html, which holds the table, the facts and the plots in one file."""
    plots = write_plots(folder, [result.run for result in results])
    dense_ms = results[0].step_ms
    lines = [
        f"<tr><td>{html.escape(result.run)}</td><td>{result.accuracy:.2f} %</td>"
        f"<td>{result.step_ms / dense_ms:.2f}</td><td>{result.training_parameters:,}</td>"
        f"<td>{result.shipped_parameters:,}</td></tr>"
        for result in results
    ]
    images = [base64.b64encode(plot.read_bytes()).decode() for plot in plots]
    path = folder / "report.html"
    path.write_text(
        f"<!doctype html><meta charset=utf-8><title>ExFusion demo</title><style>{STYLE}</style>"
        "<h1>ExFusion beside dense training</h1>"
        "<table><tr><th>run</th><th>test accuracy</th><th>step time (dense = 1)</th>"
        f"<th>parameters in training</th><th>shipped</th></tr>{''.join(lines)}</table>"
        + "".join(
            f"<p><b>{html.escape(k)}</b>: {html.escape(v)}</p>"
            for k, v in facts(check, settings).items()
        )
        + "".join(f'<p><img src="data:image/png;base64,{image}"></p>' for image in images)
    )
    return path
