"""The examples in the docstrings run, and every public name has one."""

import copy
import doctest
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

import exfusion_param as exf
from exfusion_param import history, meo, plotting, routing, study

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
GIVEN = {"copy": copy, "exf": exf, "meo": meo, "nn": nn, "torch": torch}
"""What an example need not import, besides the names of its own module."""


def modules() -> Iterator[ModuleType]:
    for info in pkgutil.walk_packages(exf.__path__, "exfusion_param."):
        yield importlib.import_module(info.name)


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder()
    found = [test for m in modules() for test in finder.find(m, m.__name__, m, extraglobs=GIVEN)]
    return [test for test in found if test.examples]


def public() -> Iterator[tuple[str, object]]:
    for module in (exf, meo, plotting, study):
        yield from ((f"{module.__name__}.{name}", vars(module)[name]) for name in module.__all__)
    for module in (history, routing):
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_"):
                yield f"{module.__name__}.{name}", value


@pytest.fixture(autouse=True)
def _no_figure_stays_open() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_an_example_prints_what_it_says(
    example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(example, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize(("name", "value"), [pair for pair in public() if callable(pair[1])])
def test_every_public_name_has_an_example(name: str, value: object) -> None:
    assert ">>> " in (value.__doc__ or ""), name
