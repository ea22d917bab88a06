"""The README's code runs, from top to bottom, and its commands exist."""

import re
from pathlib import Path
from typing import Any

import pytest

from exfusion_param import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

AS_TORCHRUN_DOES = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@pytest.mark.compiled
@pytest.mark.examples
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*view tensor:UserWarning")
def test_the_python_blocks_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in AS_TORCHRUN_DOES.items():
        monkeypatch.setenv(name, value)
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
        if "Muon" in block:
            assert_the_optimizers_hold_every_parameter(namespace)
    assert (tmp_path / "average.pt").exists()
    assert (tmp_path / "dense" / "model.safetensors").exists()
    cli.main(["plot", str(tmp_path)])


def assert_the_optimizers_hold_every_parameter(namespace: dict[str, Any]) -> None:
    held = {id(p) for group in namespace["adamw"].param_groups for p in group["params"]}
    held |= {id(stack) for stack in namespace["stacks"]}  # which Muon moves by its views
    assert held == {id(parameter) for parameter in namespace["model"].parameters()}


def test_the_commands_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = set(re.findall(r"^    make ([a-z]+)", README, re.MULTILINE))
    assert commands == {"demo", "test"}
    assert all(f"\n{command}:" in makefile for command in commands)


def test_every_link_to_a_file_is_valid() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert all((ROOT / link).exists() for link in links)
