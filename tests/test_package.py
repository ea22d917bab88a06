"""The package as a whole: its public names, its imports, the examples in its documentation."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import exfusion_param

WITH_TORCH_ALONE = """
import sys

class NothingElse:
    def find_spec(self, name, path=None, target=None):
        known = {"timm", "torchvision", "transformers", "matplotlib", "safetensors", "tyro", "tqdm"}
        if name.partition(".")[0] in known:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NothingElse())
import exfusion_param
from torch import nn
model = exfusion_param.wrap(nn.TransformerEncoderLayer(8, 2, 16), variant="sw")
exfusion_param.fuse(model)
"""


def test_public_names_are_frozen() -> None:
    assert exfusion_param.__all__ == [
        "ExFusionConfig",
        "ExpertAdamW",
        "ExpertSGD",
        "Summary",
        "expert_placement",
        "fully_shard",
        "fuse",
        "fused_state_dict",
        "load_dense_state_dict",
        "metrics",
        "no_weight_decay_names",
        "param_groups",
        "summarize",
        "token_mask",
        "wrap",
    ]
    assert all(hasattr(exfusion_param, name) for name in exfusion_param.__all__)


def test_every_module_can_be_imported_and_every_public_name_is_documented() -> None:
    for info in pkgutil.walk_packages(exfusion_param.__path__, "exfusion_param."):
        assert importlib.import_module(info.name).__doc__
    assert all(getattr(exfusion_param, name).__doc__ for name in exfusion_param.__all__)


@pytest.mark.processes
def test_torch_is_all_that_the_package_needs() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", WITH_TORCH_ALONE], check=True)


@pytest.mark.processes
def test_importing_registers_no_hook_and_keeps_torchs_random_state() -> None:
    code = """
import torch
from torch.optim import optimizer
state = torch.get_rng_state()
import exfusion_param
assert torch.equal(torch.get_rng_state(), state)
assert not optimizer._global_optimizer_pre_hooks
assert not optimizer._global_optimizer_post_hooks
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.processes
def test_the_command_without_its_library_says_what_to_install() -> None:
    code = "import sys; sys.modules['tyro'] = None; import exfusion_param.cli"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == 'exfusion: tyro is missing. Run: pip install "exfusion_param[cli]"\n'
