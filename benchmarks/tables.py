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


def environment() -> str:
    """Hardware and versions, in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores; "
        f"Python {platform.python_version()}, torch {torch.__version__}, gloo, "
        f"exfusion_param {exf.__version__}"
    )
