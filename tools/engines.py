"""Train under every engine, compare with one rank, and write docs/engines.md."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import torch
from torch.multiprocessing.spawn import ProcessRaisedException

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from exfusion_testing.engines import ENGINES  # noqa: E402
from exfusion_testing.ranks import on_ranks  # noqa: E402

PAGE = ROOT / "docs" / "engines.md"
COLUMNS = [(variant, fuse_on) for fuse_on in ("forward", "step") for variant in ("sw", "dw", "mb")]
EXACT = 1e-12
HEADER = f"""# Engines

This page lists the engines that train a wrapped model on several ranks. Each cell is the largest
difference of any number in the model from training on one rank with the full batch, after two
steps in float64 on gloo processes. A letter stands for an error, listed below the table. `make
engines` runs the cases and writes this page.

Stages under FSDP2 are sharded with `reshard_after_forward=False`. With a zero-bubble schedule
(InterleavedZeroBubble, ZBV, DualPipeV), torch otherwise loses gradients of weights that are
resharded after the forward, also for a dense model. `mb` under `"step"` refuses that.

| engine | {" | ".join(f'`{variant}`, `"{fuse_on}"`' for variant, fuse_on in COLUMNS)} |
|---{"|---" * len(COLUMNS)}|
"""
Cell = float | str
"""A difference, or the words of an error."""


def train(rank: int, name: str, columns: list[tuple[str, str]]) -> list[dict[str, torch.Tensor]]:
    """The states of one rank, a column after the other."""
    try:
        return [ENGINES[name].train(rank, *column) for column in columns]
    except Exception as error:
        if "Connection closed by peer" in str(error):
            time.sleep(10)  # for the rank that has the reason to be the first to fail
        raise


def measure(name: str, columns: list[tuple[str, str]]) -> list[Cell]:
    """The cells of an engine; one after the other if any of them is an error."""
    try:
        ranks = on_ranks(ENGINES[name].ranks, train, name, columns)
    except ProcessRaisedException as error:
        if len(columns) > 1:
            return [cell for column in columns for cell in measure(name, [column])]
        # Whichever rank is first: the name of its group differs.
        return [re.sub(r"'[\w.]+'", "'...'", str(error).strip().rpartition("Error: ")[2])]
    cells: list[Cell] = []
    for column, *states in zip(columns, *ranks, strict=True):
        one_rank = ENGINES[name].alone(*column)
        pairs = [(ours, one_rank[key]) for state in states for key, ours in state.items()]
        # Not Python's max, which loses NaN.
        cells.append(float(torch.stack([(a - b).abs().max() for a, b in pairs]).max()))
    return cells


def main() -> None:
    """Write the page; exit status 1 if a cell is a difference that is more than rounding."""
    letters: dict[str, str] = {}
    rows, is_wrong = [], False
    for name in ENGINES:
        cells = measure(name, COLUMNS)
        is_wrong |= any(isinstance(cell, float) and not cell < EXACT for cell in cells)
        shown = [
            f"{cell:.0e}" if isinstance(cell, float) else letters.setdefault(cell, _letter(letters))
            for cell in cells
        ]
        rows.append(f"| {name} | {' | '.join(shown)} |")
        print(rows[-1], flush=True)
    notes = [f"- {letter}: {words}" for words, letter in letters.items()]
    PAGE.write_text("\n".join([HEADER + "\n".join(rows), "", *notes, ""]))
    sys.exit(is_wrong)


def _letter(taken: dict[str, str]) -> str:
    return chr(ord("a") + len(taken))


if __name__ == "__main__":
    main()
