"""Each page of the documentation runs by itself, and the site builds without a warning."""

import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

import exfusion_param

ROOT = Path(__file__).parents[1]
AS_TORCHRUN_DOES = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


def code(page: Path) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return "\n".join(blocks)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_CODE = [page for page in PAGES if code(page)]
NAMES = [str(page.relative_to(ROOT)) for page in WITH_CODE]


def test_pages_have_code() -> None:
    assert len(WITH_CODE) >= 19


@pytest.mark.compiled
@pytest.mark.examples
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*view tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # in Lightning
@pytest.mark.parametrize("page", WITH_CODE, ids=NAMES)
def test_the_code_of_a_page_runs_by_itself(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in AS_TORCHRUN_DOES.items() if "torchrun" in code(page) else ():
        monkeypatch.setenv(name, value)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code(page), str(page), "exec"), namespace)


def packages_of(page: Path) -> set[str]:
    """The packages that a page's code imports and that torch does not bring along."""
    found = re.findall(r"^(?:import|from) (\w+)", code(page), re.MULTILINE)
    return set(found) - set(sys.stdlib_module_names) - {"exfusion_param", "torch"}


@pytest.mark.parametrize("page", WITH_CODE, ids=NAMES)
def test_a_page_names_the_packages_that_its_code_imports(page: Path) -> None:
    named = " ".join(re.findall(r"`pip install ([^`]*)`", page.read_text()))
    assert packages_of(page) <= set(named.split())


def test_the_site_builds_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
    with caplog.at_level(logging.WARNING):
        build(config)
    assert not caplog.records
    assert (tmp_path / "index.html").exists()
    method = (tmp_path / "concepts/method.html").read_text()
    assert "<math" in method
    assert "arithmatex" not in method


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs/reference/exfusion_param.md").read_text()
    assert set(re.findall(r"- (\w+)", page)) == set(exfusion_param.__all__)


def test_links_of_pages_outside_of_the_site_are_valid() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "examples/README.md"):
        page = ROOT / name
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        assert links, name
        assert [link for link in links if not (page.parent / link).exists()] == [], name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_the_commands_are_those_of_the_makefile() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    commands = set(re.findall(r"^    make ([a-z]+)", readme, re.MULTILINE))
    assert commands == {"demo", "test"}
    assert all(f"\n{command}:" in makefile for command in commands)
