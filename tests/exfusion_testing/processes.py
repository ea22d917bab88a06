"""Starts processes in milliseconds: forks of one that has imported the libraries, and no more.

Importing torch, timm, transformers and lightning takes longer than what most of these processes do.
They are processes in every other way: they can be killed, and share no state.
"""

import atexit
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

PRELOADED = [
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch.utils.tensorboard",
    "accelerate",
    "lightning",
    "matplotlib.pyplot",
    "timm",
    "torchdata.stateful_dataloader",
    "torchmetrics.functional.classification",
    "transformers.modeling_utils",
    "transformers.models.bert.modeling_bert",
    "transformers.trainer",
    "tyro",
    "exfusion_param.checkpoint",
]
FORKS = "forkserver"
"""The start method."""
multiprocessing.set_forkserver_preload(PRELOADED)


class Script:
    """A Python script that runs in a process of its own, as `python path *arguments` would.

    Args:
        path: of the script.
        arguments: of its command line.
        cwd: where it runs; by default here.
        env: variables besides those of this process.
    """

    def __init__(
        self,
        path: Path,
        *arguments: object,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, self._folder)
        command = [str(path), *map(str, arguments)]
        variables = dict(os.environ) | dict(env or {})
        self._process = multiprocessing.get_context(FORKS).Process(
            target=_run, args=(command, self._folder, str(cwd or Path.cwd()), variables)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit status; None as long as it runs."""
        return self._process.exitcode

    def wait(self, timeout: float = 300) -> int:
        """The exit status."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"still running after {timeout} s: {self.error}")
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """To the process."""
        os.kill(self.pid, number)

    @property
    def output(self) -> str:
        """What it has written to stdout."""
        return Path(self._folder, "stdout").read_text()

    @property
    def error(self) -> str:
        """What it has written to stderr."""
        return Path(self._folder, "stderr").read_text()

    def finish(self) -> str:
        """What it writes to stdout until it has ended well."""
        assert self.wait() == 0, self.error
        return self.output


def run(path: Path, *arguments: object) -> str:
    """What a script prints."""
    return Script(path, *arguments).finish()


def start_ranks(count: int, path: Path, *arguments: object) -> list[Script]:
    """Ranks of one run, with the variables that torchrun would give them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        Script(path, *arguments, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


def _run(command: list[str], folder: str, cwd: str, variables: dict[str, str]) -> None:
    for name, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a fork of multiprocessing leaves out
