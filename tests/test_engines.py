"""A few cells are as docs/engines.md has them; `make nightly` takes all.

`make engines` writes the page.
"""

import os
import re

import pytest

import engines
from exfusion_testing.engines import ENGINES

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
FEW = [
    ("wrap, then DDP and ZeRO-1", [("sw", "step"), ("mb", "step")]),
    ("wrap, then FSDP1", [("mb", "forward")]),
    ("tensor parallelism, then wrap", [("dw", "step")]),
]
ROWS = [(name, engines.COLUMNS) for name in ENGINES] if NIGHTLY else FEW


def page() -> dict[str, list[str]]:
    """The cells by the engine."""
    rows = re.findall(r"^\| (.+?) \|(.+)\|$", engines.PAGE.read_text(), re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows[1:]}


def test_the_page_has_every_engine() -> None:
    assert list(page()) == list(ENGINES)


@pytest.mark.processes
@pytest.mark.parametrize(("name", "columns"), ROWS)
def test_cells_are_as_on_the_page(name: str, columns: list[tuple[str, str]]) -> None:
    for column, cell in zip(columns, engines.measure(name, columns), strict=True):
        shown = page()[name][engines.COLUMNS.index(column)]
        if isinstance(cell, str):
            assert f"- {shown}: {cell}" in engines.PAGE.read_text()
        else:
            assert max(cell, float(shown)) < engines.EXACT
