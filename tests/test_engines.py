"""A short form of `make engines`: a few cells are as docs/engines.md has them."""

import re

import pytest

import engines
from exfusion_testing.engines import ENGINES

CELLS = [
    ("wrap, then DDP and ZeRO-1", ("sw", "step")),
    ("wrap, then DDP and ZeRO-1", ("mb", "step")),
    ("wrap, then FSDP1", ("mb", "forward")),
    ("tensor parallelism, then wrap", ("dw", "step")),
]


def page() -> dict[str, list[str]]:
    """The cells by the engine."""
    rows = re.findall(r"^\| (.+?) \|(.+)\|$", engines.PAGE.read_text(), re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows[1:]}


def test_the_page_has_every_engine() -> None:
    assert list(page()) == list(ENGINES)


@pytest.mark.processes
@pytest.mark.parametrize(("name", "column"), CELLS)
def test_a_cell_is_as_on_the_page(name: str, column: tuple[str, str]) -> None:
    (cell,) = engines.measure(name, [column])
    shown = page()[name][engines.COLUMNS.index(column)]
    if isinstance(cell, str):
        assert f"- {shown}: {cell}" in engines.PAGE.read_text()
    else:
        assert max(cell, float(shown)) < engines.EXACT
