"""Build wheel and sdist in dist/, check their metadata, and run the tests against the wheel.

    python tools/package.py                        # the whole suite
    python tools/package.py tests/test_config.py   # some tests; any arguments of pytest

The wheel is unpacked before `src/` on the path of the tests, so that they import what users would
install. Run it by `make package`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"


def run(*command: str | Path, **environment: str) -> None:
    """Run a command in the repository, and stop here if it fails."""
    code = subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode
    if code:
        sys.exit(code)


def main(arguments: list[str]) -> None:
    """Build, check, unpack, test."""
    python = sys.executable
    shutil.rmtree(DIST, ignore_errors=True)
    run(python, "-m", "build", "--outdir", DIST, ROOT)
    run(python, "-m", "twine", "check", "--strict", *DIST.iterdir())
    (wheel,) = DIST.glob("*.whl")
    with tempfile.TemporaryDirectory() as unpacked:
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", unpacked, wheel)
        path = {"PYTHONPATH": unpacked}
        found = "import exfusion_param, sys; sys.exit(sys.argv[1] not in exfusion_param.__file__)"
        run(python, "-c", found, unpacked, **path)
        run(python, "-m", "pytest", "-n2", "--dist=loadfile", "-q", *arguments, **path)


if __name__ == "__main__":
    main(sys.argv[1:])
