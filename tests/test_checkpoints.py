"""A run that is saved and resumed is the run that was never interrupted."""

import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from torch import nn

import exfusion_param as exf
from exfusion_param import meo
from exfusion_param.checkpoint import CheckpointError, Checkpoints, StopRequest, fuse_checkpoint
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.runs import Run, assert_equal, resumed
from exfusion_testing.sharded import EXACT

CONFIGS: list[dict[str, Any]] = [
    {"variant": variant, "fuse_on": fuse_on}
    for variant in ("sw", "dw", "mb")
    for fuse_on in ("forward", "step")
] + [
    {"fuse_on": "step", "state_dtype": torch.bfloat16},
    {"fuse_on": "forward", "optimizer": torch.optim.AdamW},
    {"fuse_on": "step", "optimizer": torch.optim.Adagrad},
    {"fuse_on": "forward", "optimizer": torch.optim.SGD},
]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_resumed_equals_uninterrupted_bit_by_bit(
    tmp_path: Path, config: dict[str, Any], asynchronous: bool
) -> None:
    run = Run(tmp_path, asynchronous=asynchronous, **config).train(0, 3)
    run.checkpoints.save(3)
    run.train(3, 6)
    run.checkpoints.wait()
    assert_equal([resumed(tmp_path, **config).train(3, 6).state()], run.state())


@pytest.mark.parametrize("modes", [("step", "forward"), ("forward", "step")])
def test_a_checkpoint_of_the_other_fuse_on_is_refused(
    tmp_path: Path, modes: tuple[str, str]
) -> None:
    Run(tmp_path, fuse_on=modes[0]).train(0, 1).checkpoints.save(1)
    with pytest.raises(CheckpointError, match=f'saved under fuse_on="{modes[0]}"'):
        Run(tmp_path, fuse_on=modes[1]).checkpoints.resume()


@pytest.mark.parametrize("fuse_on", ["forward", "step"])
def test_a_checkpoint_within_an_accumulation_keeps_gradients_and_votes(
    tmp_path: Path, fuse_on: str
) -> None:
    run = Run(tmp_path, fuse_on=fuse_on).train(0, 2)
    run.backward(inputs(batch=4, seed=7))
    run.checkpoints.save(3)
    other = resumed(tmp_path, fuse_on=fuse_on)
    for each in (run, other):
        torch.manual_seed(3)
        each.backward(inputs(batch=8, seed=8))
        each.step()
        each.train(3, 5)
    assert_equal([other.state()], run.state())


def test_eight_bit_states_are_saved(tmp_path: Path) -> None:
    def run(seed: int) -> tuple[nn.Module, exf.ExpertAdamW, Checkpoints]:
        torch.manual_seed(seed)
        model = exf.wrap(FFNs(dim=16, hidden=64), fuse_on="step", bank_init="uniform")
        optimizer = exf.ExpertAdamW(exf.param_groups(model, 0.1), lr=0.02, state_dtype="8bit")
        parts = {"model": model, "optimizer": optimizer}
        return model, optimizer, Checkpoints(tmp_path, parts)

    def train(model: nn.Module, optimizer: exf.ExpertAdamW, seeds: range) -> None:
        for seed in seeds:
            loss_of(model, inputs(dim=16, seed=seed).float()).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer, checkpoints = run(0)
    train(model, optimizer, range(3))
    checkpoints.save(3)
    train(model, optimizer, range(3, 6))
    again, optimizer, checkpoints = run(1)
    checkpoints.resume()
    train(again, optimizer, range(3, 6))
    assert_equal([again.state_dict()], model.state_dict())


class Odd(nn.Module):
    """Tied weights, views, a transposed weight, an extra state, a scalar and an empty buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.t = nn.Parameter(torch.randn(3, 5).t())
        rows = torch.randn(4, 4)
        self.register_buffer("top", rows[:2])
        self.register_buffer("bottom", rows[2:])
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("empty", torch.zeros(0, 2))
        self.extra: Any = {"epoch": 4, "seen": (1, 2)}

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("asynchronous", [False, True])
def test_odd_tensors_survive(tmp_path: Path, asynchronous: bool) -> None:
    model, other = Odd(), Odd()
    other.extra = None
    checkpoints = Checkpoints(tmp_path, {"model": model}, asynchronous=asynchronous)
    checkpoints.save(1)
    checkpoints.wait()
    assert Checkpoints(tmp_path, {"model": other}).resume() == 1
    state = other.state_dict()
    assert state.pop("_extra_state") == model.extra
    assert_equal([state], {k: v for k, v in model.state_dict().items() if k in state})
    assert other.b.weight is other.a.weight


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, schedulefree.AdamWScheduleFree])
def test_optimizers_with_states_of_their_own_kind(tmp_path: Path, optimizer: Any) -> None:
    def run(seed: int) -> tuple[nn.Module, Any, Checkpoints]:
        torch.manual_seed(seed)
        model = exf.wrap(FFNs().double(), variant="sw", num_experts=2)
        own = optimizer(model.parameters(), lr=0.01)
        return model, own, Checkpoints(tmp_path, {"model": model, "optimizer": own})

    def train(model: nn.Module, own: Any, seeds: range) -> None:
        if hasattr(own, "train"):
            own.train()
        for seed in seeds:

            def closure(seed: int = seed) -> Any:
                own.zero_grad()
                loss = loss_of(model, inputs(seed=seed))
                loss.backward()
                return loss

            own.step(closure)
            own.zero_grad()

    model, own, checkpoints = run(0)
    train(model, own, range(3))
    checkpoints.save(3)
    train(model, own, range(3, 6))
    again, own, checkpoints = run(1)
    checkpoints.resume()
    train(again, own, range(3, 6))
    assert_equal([again.state_dict()], model.state_dict())


def test_a_model_of_merged_experts_is_saved(tmp_path: Path) -> None:
    model, other = (meo.wrap(FFNs(), num_experts=3, top_k=2, seed=seed) for seed in (0, 1))
    Checkpoints(tmp_path, {"model": model}).save(2)
    assert Checkpoints(tmp_path, {"model": other}).resume() == 2
    assert_equal([other.state_dict()], model.state_dict())
    small = meo.wrap(FFNs(), num_experts=2, top_k=2)
    with pytest.raises(CheckpointError, match=r"3 experts|shape"):
        Checkpoints(tmp_path, {"model": small}).resume()


def test_without_a_checkpoint_a_run_starts_at_zero(tmp_path: Path) -> None:
    assert Run(tmp_path / "new").checkpoints.resume() == 0


def test_the_last_ones_stay_and_the_latest_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=2)
    for step in (1, 2, 3):
        run.checkpoints.save(step)
        assert (tmp_path / "latest").read_text() == f"step-{step:08d}"
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]
    everything = Run(tmp_path / "all", keep=None)
    for step in range(5):
        everything.checkpoints.save(step)
    assert len(list((tmp_path / "all").glob("step-*"))) == 5


def test_a_step_is_saved_again_and_a_run_can_go_back(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (1, 2, 3):
        run.train(step - 1, step).checkpoints.save(step)
    (tmp_path / "latest").write_text("step-00000002")
    back = Run(tmp_path)
    assert back.checkpoints.resume() == 2
    back.train(7, 8).checkpoints.save(3)  # in place of the abandoned one
    again = Run(tmp_path)
    assert again.checkpoints.resume() == 3
    assert_equal([again.state()], back.state())


def test_experts_in_bfloat16_resume_bit_by_bit(tmp_path: Path) -> None:
    def run(seed: int) -> tuple[nn.Module, exf.ExpertAdamW, Checkpoints]:
        torch.manual_seed(seed)
        model = exf.wrap(FFNs(), fuse_on="step", bank_init="uniform")
        groups = exf.param_groups(model, 0.1)
        optimizer = exf.ExpertAdamW(groups, lr=0.02, expert_dtype=torch.bfloat16)
        return model, optimizer, Checkpoints(tmp_path, {"model": model, "optimizer": optimizer})

    def train(model: nn.Module, optimizer: exf.ExpertAdamW, seeds: range) -> None:
        for seed in seeds:
            loss_of(model, inputs(seed=seed).float()).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer, checkpoints = run(0)
    train(model, optimizer, range(3))
    checkpoints.save(3)
    train(model, optimizer, range(3, 6))
    again, optimizer, checkpoints = run(1)
    checkpoints.resume()
    train(again, optimizer, range(3, 6))
    assert_equal([again.state_dict()], model.state_dict())


def test_arguments_are_checked(tmp_path: Path) -> None:
    model = FFNs()
    with pytest.raises(ValueError, match="keep must be at least 1"):
        Checkpoints(tmp_path, {"model": model}, keep=0)
    with pytest.raises(ValueError, match="cannot name a part"):
        Checkpoints(tmp_path, {"../model": model})
    with pytest.raises(ValueError, match="which has no state_dict"):
        Checkpoints(tmp_path, {"step": 3})
    with pytest.raises(ValueError, match="in none of the modules"):
        Checkpoints(tmp_path, {"optimizer": torch.optim.SGD(model.parameters())})
    with pytest.raises(ValueError, match="leave_out names"):
        Checkpoints(tmp_path, {"model": model}).resume(leave_out=["modle"])


def test_a_checkpoint_of_a_run_is_fused_by_the_command(tmp_path: Path) -> None:
    run = Run(tmp_path).train(0, 2)
    run.checkpoints.save(2)
    fuse_checkpoint(tmp_path / "step-00000002/model", tmp_path / "dense.safetensors")
    from safetensors.torch import load_file

    dense = load_file(tmp_path / "dense.safetensors")
    for name, tensor in exf.fused_state_dict(run.model).items():
        torch.testing.assert_close(dense[name], tensor, **EXACT)


def test_a_stop_is_noted_and_the_second_one_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        stop = StopRequest((signal.SIGTERM,))
        assert not stop.received()
        signal.raise_signal(signal.SIGTERM)
        assert stop.received()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_saving_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = Run(tmp_path).train(0, 1)
        run.checkpoints.save(1)
        run.checkpoints.resume()
