"""Errors of Merging Experts into One: settings, linears, fusing per-sample weights."""

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_param import meo
from exfusion_param.checkpoint import CheckpointError, fuse_checkpoint, save_config
from exfusion_testing.meo_models import wrap, wrapped
from exfusion_testing.models import FFNs, inputs


def test_models_with_a_weight_for_each_sample_are_not_fused() -> None:
    model = wrapped()
    before = copy.deepcopy(model.state_dict())
    for fuse in (exf.fuse, exf.fused_state_dict):
        with pytest.raises(ValueError, match="no dense model computes the same"):
            fuse(model)
    for fuse in (meo.fuse, meo.fused_state_dict):
        with pytest.raises(ValueError, match="no dense model computes the same"):
            fuse(model)
        with pytest.raises(ValueError, match="has no tasks"):
            fuse(model, task=0)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    model(inputs())


def test_a_checkpoint_on_disk_is_not_fused_without_its_model(tmp_path: Path) -> None:
    model = wrapped(level="task", task_dim=2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    save_config(model, tmp_path)
    with pytest.raises(CheckpointError, match="is one of MEO"):
        fuse_checkpoint(tmp_path, tmp_path / "dense")
    other = wrapped(level="task", task_dim=2)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_the_weight_of_a_sample_cannot_be_read() -> None:
    linear = wrapped().blocks[0].fc1
    assert linear.weight.shape == (6, 4)
    assert linear.weight.dtype == torch.float64
    assert linear.weight.device.type == "cpu"
    assert "PerSampleWeight" in repr(linear.weight) or "tensor" in repr(linear.weight)
    expert = linear.parametrizations.weight.original.clone()
    for compute in (
        lambda w: w + 1,
        lambda w: w.sum(),
        lambda w: w.data.normal_(),
        lambda w: w.T.fill_(1),
        lambda w: w.detach().zero_(),
        lambda w: nn.functional.linear(inputs(), w),
    ):
        with pytest.raises(RuntimeError, match="merges its experts again for each sample"):
            compute(linear.weight)
    assert torch.equal(linear.parametrizations.weight.original, expert)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
def test_what_is_registered_on_a_weight_of_a_sample_is_refused(norm: str) -> None:
    model = wrapped()

    def run() -> None:
        getattr(nn.utils.parametrizations, norm)(model.blocks[0].fc1)
        model(inputs())

    with pytest.raises(RuntimeError, match=r"for each sample.*level=\"task\""):
        run()


def test_a_replaced_first_linear_of_a_shared_gate_is_refused_and_the_ways_out_work() -> None:
    square = FFNs(4, 4).double()  # where the second linear's input fits the gate, too
    model = wrap(square, shared_gate=True)
    first, model.blocks[0].fc1 = model.blocks[0].fc1, nn.Linear(4, 4).double()
    with pytest.raises(RuntimeError, match="without the linear whose input their shared gate"):
        model(inputs())
    model.blocks[0].fc1 = first
    model(inputs())
    own = wrap(FFNs(4, 4).double(), shared_gate=False)
    own.blocks[0].fc1 = nn.Linear(4, 4).double()
    own(inputs())


@pytest.mark.parametrize("fields", [{}, {"level": "task", "task_dim": 2}], ids=str)
def test_an_offloaded_model_is_refused_and_right_once_it_is_back(fields: Any) -> None:
    model = wrapped(**fields).eval()
    if fields:
        meo.set_task(model, 1)
    expected = model(inputs())
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="gate of 'blocks.0.fc1' is on the meta device"):
        model(inputs())
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(model(inputs()), expected, rtol=0, atol=0)


class Scaled(nn.Linear):
    """Does more than a linear."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice what a linear gives."""
        return 2 * super().forward(x)


def test_linears_that_do_more_are_refused_for_each_sample() -> None:
    model = nn.Sequential(Scaled(4, 8), nn.GELU(), nn.Conv1d(8, 4, 1, stride=2))
    for fqn in ("0", "2"):
        with pytest.raises(ValueError, match=f"'{fqn}' is a .* may do more than a linear's"):
            meo.wrap(model, filter_fn=[fqn])
    meo.wrap(model, filter_fn=["0"], level="task", task_dim=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"level": "word"}, "level must be one of task, sequence, token"),
        ({"gating": "hash"}, "gating must be one of"),
        ({"top_k": 9}, "top_k must be from 1 to num_experts = 8"),
        ({"top_k": 0}, "top_k must be from 1"),
        ({"gating": "softmax", "top_k": 2}, "merges all 8 experts"),
        ({"level": "task"}, 'level="task" needs task_dim'),
        ({"task_dim": 3}, "no other level has one"),
        ({"level": "task", "task_dim": 0}, "task_dim must be >= 1"),
        ({"level": "task", "task_dim": 2, "causal": True}, "has no effect with level"),
        ({"segment_length": 0}, "segment_length must be >= 1"),
        ({"batch_dim": 2}, "batch_dim must be 0, 1 or None"),
        ({"balance_weight": -1}, "balance_weight must be >= 0"),
        ({"num_experts": 1}, "num_experts must be >= 2"),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        meo.MEOConfig(**fields)


def test_settings_of_other_types_are_refused_and_plain_values_come_back() -> None:
    with pytest.raises(TypeError, match="causal must be a bool"):
        meo.MEOConfig(causal=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="MEOConfig has no field momentum"):
        meo.wrap(FFNs(), momentum=0.9)
    with pytest.raises(TypeError, match="config must be a MEOConfig or None, got ExFusionConfig"):
        meo.wrap(FFNs(), exf.ExFusionConfig())  # type: ignore[arg-type]
    config = meo.MEOConfig(level="token", top_k=2, layers=(0,), seed=3)
    assert meo.MEOConfig.from_dict(config.to_dict()) == config
