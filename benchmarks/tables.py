"""Tables of results, and the machine that they are from."""

import csv
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import exfusion_param as exf


def write_csv(path: Path, rows: Sequence[Any]) -> None:
    """A table of dataclasses."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(vars(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(vars, rows))


def markdown_table(rows: Sequence[Any]) -> str:
    """The same table in Markdown."""
    lines = [[name.replace("_", " ") for name in vars(rows[0])], ["---"] * len(vars(rows[0]))]
    lines += [
        [f"{v:,}" if isinstance(v, int) else str(v) for v in vars(row).values()] for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_results(folder: Path, name: str, title: str, note: str, rows: Sequence[Any]) -> None:
    """A table as CSV, and in Markdown under a title, a note and where it was measured."""
    write_csv(folder / f"{name}.csv", rows)
    text = f"# {title}\n\n{note}\n\n{environment()}.\n\n{markdown_table(rows)}\n"
    (folder / f"{name}.md").write_text(text)


def environment() -> str:
    """Hardware and versions, in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    gpu = f"{torch.cuda.get_device_name()}; " if torch.cuda.is_available() else ""
    return (
        f"{gpu}{names[0] if names else platform.processor()}, {os.cpu_count()} cores; "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"exfusion_param {exf.__version__}"
    )
