"""The commands of the Makefile, and tools that see no more than the repository's own files."""

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import exfusion_param
import set_up

ROOT = Path(__file__).parents[1]
IN_ORDER = '''"""Its imports are sorted."""

from timm import create_model
from torch import nn

from exfusion_param import wrap
from support import ranks

print(create_model, nn, wrap, ranks)
'''


def make(*arguments: object) -> tuple[int, str]:
    """The exit status and the output of make, whatever the make is that may run this test."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--no-print-directory", "PYTHON=true", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True)
    return result.returncode, result.stdout


@pytest.mark.processes
@pytest.mark.parametrize("arguments", [(), ("help",)])
def test_help_lists_every_command(arguments: tuple[str, ...]) -> None:
    commands = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert commands is not None
    lines = make(*arguments)[1].splitlines()
    assert [line.split()[1] for line in lines] == commands[1].split()
    prefixes = [prefix for line in lines for prefix in re.findall(r"^make [\w-]+ +", line)]
    assert len(set(map(len, prefixes))) == 1


@pytest.mark.processes
def test_make_test_runs_every_part() -> None:
    code, planned = make("-n", "test", "TESTS=tests/test_config.py")
    assert code == 0
    for command in ("ruff check", "ruff format --check", "mypy", "pytest --numprocesses=2"):
        assert f".venv/bin/{command}" in planned
    assert "tests/test_config.py" in planned


@pytest.mark.parametrize(
    "broken", ["ruff check", "ruff format", "codespell", "python", "mypy", "pytest"]
)
def test_a_part_that_fails_hides_no_other(tmp_path: Path, broken: str) -> None:
    for name in ("ruff", "mypy", "pytest", "codespell", "python"):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/sh\ncase "{name} $*" in "{broken}"*) exit 1;; esac\n')
        tool.chmod(0o755)
    code, output = make("test", f"BIN={tmp_path}")
    assert code != 0
    part = {"mypy": "types", "pytest": "unit"}.get(broken, "lint")
    verdicts = dict(line.split() for line in output.splitlines()[-3:])
    assert verdicts == {"lint": "passed", "types": "passed", "unit": "passed"} | {part: "FAILED"}


def test_ruff_judges_nothing_beside_the_code_and_nothing_by_it(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path, text in {
        "tests/test_imports.py": IN_ORDER,
        "notes.py": "import os,sys",
        "torch.py": "import os,sys",
        "runs/timm.py": "import os,sys",
        "timm/__init__.py": "import os,sys",
        "build/lib/exfusion_param/__init__.py": "import os,sys",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    for command in (["check"], ["format", "--check"]):
        ruff = [str(Path(sys.executable).parent / "ruff"), *command, "--no-cache"]
        result = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


def test_helpers_are_in_a_package_of_their_own() -> None:
    names = {path.stem for path in (ROOT / "tests").glob("*.py")}
    assert all(name == "conftest" or name.startswith("test_") for name in names)


def test_no_two_folders_define_the_same_module() -> None:
    """All of them are on the path of the tests at once."""
    folders = ("tests", "examples", "tools", "benchmarks")
    names = [path.stem for folder in folders for path in (ROOT / folder).glob("*.py")]
    assert len(names) == len(set(names))


def test_a_step_of_the_set_up_takes_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    set_up.run("greeting", (sys.executable, "-c", "print('a deprecation')"))
    assert re.fullmatch(r"greeting: \d+ s\n", capfd.readouterr().out)


def test_a_set_up_that_fails_says_why_and_leaves_no_mark_of_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "installed"
    mark.touch()
    code = "import sys; print('no such package', file=sys.stderr); sys.exit(3)"
    monkeypatch.setattr(set_up, "INSTALLED", mark)
    monkeypatch.setattr(set_up, "STEPS", {"packages": (sys.executable, "-c", code)})
    with pytest.raises(SystemExit) as stopped:
        set_up.main()
    assert stopped.value.code == 3
    assert "no such package" in capfd.readouterr().out
    assert not mark.exists()


def test_progress_is_read_from_pip() -> None:
    found = "Collecting torch\n  Downloading torch.whl\nCollecting timm\n"
    assert set_up.progress("", 0) == ""
    assert set_up.progress(found, 0) == "2 found, "
    installing = found + "Installing collected packages: timm, torch\n"
    assert set_up.progress(installing, 1) == "1 of 2 installed, "


def test_the_version_is_the_same_wherever_it_is_written() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {exfusion_param.__version__}\n" in citation


def test_the_table_of_tests_lists_every_file() -> None:
    table = (ROOT / "tests/README.md").read_text().split("\n| part |")[1]
    listed = re.findall(r"`([a-z0-9_*]+)`", table.split("\n\n")[0])
    files = {path.stem.removeprefix("test_") for path in ROOT.glob("tests/test_*.py")}
    unlisted = {name for name in files if not any(fnmatch(name, entry) for entry in listed)}
    assert not unlisted
