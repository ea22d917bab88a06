"""The commands of the Makefile, and tools that see no more than the repository's own files."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import set_up

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"src", "tests", "examples", "tools", "benchmarks"}


def make(*arguments: str) -> str:
    """What make says outside of the make that may run this test."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=outside, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.processes
@pytest.mark.parametrize("arguments", [(), ("help",)])
def test_help_lists_every_command(arguments: tuple[str, ...]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = re.search(r"^\.PHONY: (.*)", makefile, re.MULTILINE)
    assert commands is not None
    lines = make(*arguments).splitlines()
    assert [line.split()[1] for line in lines] == commands[1].split()
    assert len({re.match(r"make \w+ +", line).end() for line in lines}) == 1


@pytest.mark.processes
def test_make_test_runs_every_part() -> None:
    planned = make("-n", "test", "TESTS=tests/test_config.py")
    for command in ("ruff check", "ruff format --check", "mypy", "pytest --numprocesses=2"):
        assert f".venv/bin/{command}" in planned
    assert "tests/test_config.py" in planned
    assert planned.splitlines()[-3:] == ["lint   passed", "types  passed", "unit   passed"]


def test_ruff_looks_at_nothing_beside_the_folders_of_code() -> None:
    assert set(PROJECT["tool"]["ruff"]["src"]) == FOLDERS
    kept = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert kept >= FOLDERS


def test_helpers_are_in_a_package_of_their_own() -> None:
    modules = {path.stem for path in (ROOT / "tests").glob("*.py")}
    assert all(name == "conftest" or name.startswith("test_") for name in modules)


def test_no_two_folders_of_code_define_the_same_module() -> None:
    """All of them are on the path of the tests at once."""
    names = [path.stem for folder in FOLDERS - {"src"} for path in (ROOT / folder).glob("*.py")]
    assert sorted(names) == sorted(set(names))


def test_a_step_of_the_set_up_takes_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    set_up.run("greeting", (sys.executable, "-c", "print('a deprecation')"))
    assert re.fullmatch(r"greeting: \d+ s\n", capfd.readouterr().out)


def test_a_step_that_fails_shows_all_that_it_said(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('no such package', file=sys.stderr); sys.exit(3)"
    with pytest.raises(SystemExit) as stopped:
        set_up.run("packages", (sys.executable, "-c", code))
    assert stopped.value.code == 3
    assert "no such package" in capfd.readouterr().out


def test_a_failed_set_up_leaves_no_mark_of_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "installed"
    mark.touch()
    monkeypatch.setattr(set_up, "INSTALLED", mark)
    monkeypatch.setattr(set_up, "STEPS", {"packages": (sys.executable, "-c", "exit(1)")})
    with pytest.raises(SystemExit):
        set_up.main()
    assert not mark.exists()


def test_progress_is_read_from_pip() -> None:
    found = "Collecting torch\n  Downloading torch.whl\nCollecting timm\n"
    assert set_up.progress("", 0) == ""
    assert set_up.progress(found, 0) == "2 found, "
    assert set_up.progress(found + "Installing collected packages: timm, torch\n", 1) == (
        "1 of 2 installed, "
    )
