"""The walks of docs/architecture.md pass through the files that it lists, in that order."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import exfusion_param as exf
from exfusion_param.checkpoint import Checkpoints
from exfusion_param.fusion import linear_class

SOURCE = Path(exf.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"


def listed(title: str) -> list[str]:
    """The file that each step of a walk begins with."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^\d+\. `([\w/]+\.py)`", section, re.MULTILINE)


@contextmanager
def walked() -> Iterator[list[str]]:
    """The files that are entered, each when it is entered first."""
    files: dict[str, None] = {}

    def note(frame: Any, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and SOURCE in path.parents:
            files.setdefault(path.relative_to(SOURCE).as_posix())

    seen: list[str] = []
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(before)
        seen.extend(files)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def by_wrap(tmp_path: Path) -> list[str]:
    # The first linear of a kind in this process makes the class that later ones share.
    with mock.patch.dict(linear_class._shared, clear=True), walked() as files:
        exf.wrap(model())
    return files


def by_forward(tmp_path: Path) -> list[str]:
    wrapped = exf.wrap(model())
    with walked() as files:
        wrapped(torch.randn(2, 3, 8))
    return files


def by_step(tmp_path: Path) -> list[str]:
    wrapped = exf.wrap(model(), fuse_on="step")
    optimizer = torch.optim.AdamW(wrapped.parameters())
    wrapped(torch.randn(2, 3, 8)).square().sum().backward()
    with walked() as files:
        optimizer.step()
    return files


def by_save(tmp_path: Path) -> list[str]:
    wrapped = exf.wrap(model())
    optimizer = torch.optim.AdamW(wrapped.parameters())
    checkpoints = Checkpoints(tmp_path, {"model": wrapped, "optimizer": optimizer})
    with walked() as files:
        checkpoints.save(1)
    return files


@pytest.mark.parametrize(
    ("title", "walk"),
    [
        ("A model through `wrap`", by_wrap),
        ("An input through the forward", by_forward),
        ("A gradient through the step", by_step),
        ("A run through a save and a resume", by_save),
    ],
)
def test_a_walk_is_as_its_page_says(
    title: str, walk: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    files, expected = walk(tmp_path), listed(title)
    assert len(expected) >= 6
    assert [file for file in files if file in expected] == list(dict.fromkeys(expected))


def test_every_file_on_the_page_exists() -> None:
    named = re.findall(r"`([\w]+/[\w/]+\.py)`", PAGE.read_text(encoding="utf-8"))
    assert named
    for name in named:
        assert (SOURCE / name).is_file() or (PAGE.parents[1] / name).is_file(), name
