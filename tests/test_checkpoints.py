"""A run that is saved and resumed is the run that was never interrupted."""

import contextlib
import copy
import json
import resource
import shutil
import signal
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import exfusion_param as exf
from exfusion_param import meo
from exfusion_param.checkpoint import CheckpointError, Checkpoints, StopRequest, fuse_checkpoint
from exfusion_param.checkpoint.files.plain_values import join, same, split
from exfusion_param.checkpoint.run.resize_math import resize
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.runs import Run, assert_equal
from exfusion_testing.sharded import EXACT
from fault_files import sealed

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


def resumed(folder: Path, **settings: Any) -> Run:
    run = Run(folder, seed=5, **settings)
    assert run.checkpoints.resume() == 3
    return run


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


@pytest.mark.parametrize("left", [".partial", ".replaced"])
def test_what_a_dead_process_left_is_tidied(tmp_path: Path, left: str) -> None:
    run = Run(tmp_path).train(0, 3)
    run.checkpoints.save(3)
    whole = tmp_path / "step-00000003"
    if left == ".replaced":  # it died between two renames
        whole.rename(tmp_path / "step-00000003.replaced")
    else:
        shutil.copytree(whole, tmp_path / "step-00000004.partial")
        (tmp_path / "latest.partial").write_text("step-0000")
    assert_equal([resumed(tmp_path).state()], run.state())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003"]


def damage(path: Path, how: str, at: float) -> None:
    content = bytearray(path.read_bytes())
    position = min(int(at * len(content)), len(content) - 1)
    if how == "flip":
        content[position] ^= 1 << int(at * 997) % 8
        path.write_bytes(content)
    elif how == "truncate":
        path.write_bytes(content[:position])
    elif how == "grow":
        path.write_bytes(bytes(content) + b"\0")
    else:
        path.unlink()


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("run")
    run = Run(folder).train(0, 3)
    run.checkpoints.save(3)
    state = copy.deepcopy(run.state())
    run.train(3, 4).checkpoints.save(4)
    return folder, state


@given(
    file=st.integers(0, 20),
    how=st.sampled_from(["flip", "truncate", "grow", "delete"]),
    at=st.floats(0, 1, exclude_max=True),
)
def test_a_damaged_checkpoint_is_passed_over(
    two_checkpoints: tuple[Path, Any],
    tmp_path_factory: pytest.TempPathFactory,
    file: int,
    how: str,
    at: float,
) -> None:
    saved, state = two_checkpoints
    folder = tmp_path_factory.mktemp("copy") / "run"
    shutil.copytree(saved, folder)
    files = sorted(path for path in (folder / "step-00000004").rglob("*") if path.is_file())
    damage(files[file % len(files)], how, at)
    run = Run(folder, seed=9)
    with pytest.warns(UserWarning, match="Passed over a checkpoint"):
        assert run.checkpoints.resume() == 3
    assert_equal([run.state()], state)
    shutil.rmtree(folder)


@pytest.mark.parametrize("latest", [b"", b"\xff\xfe", b"step-00000009", b"../../etc/passwd"])
def test_a_damaged_pointer_loses_nothing(
    two_checkpoints: tuple[Path, Any], tmp_path: Path, latest: bytes
) -> None:
    shutil.copytree(two_checkpoints[0], tmp_path / "run")
    (tmp_path / "run/latest").write_bytes(latest)
    assert Run(tmp_path / "run").checkpoints.resume() == 4


def test_when_all_are_damaged_nothing_is_loaded(
    two_checkpoints: tuple[Path, Any], tmp_path: Path
) -> None:
    shutil.copytree(two_checkpoints[0], tmp_path / "run")
    for manifest in (tmp_path / "run").rglob("manifest.json"):
        manifest.write_text("{}")
    run = Run(tmp_path / "run", seed=9)
    before = run.state()
    with (
        pytest.warns(UserWarning, match="Passed over"),
        pytest.raises(CheckpointError, match=r"All 2 checkpoints in .* are damaged"),
    ):
        run.checkpoints.resume()
    assert_equal([run.state()], before)


def test_a_newer_format_is_not_read(two_checkpoints: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copytree(two_checkpoints[0] / "step-00000004", tmp_path / "step-00000004")
    path = tmp_path / "step-00000004/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    sealed(path.parent)
    with (
        pytest.warns(UserWarning, match="Passed over"),
        pytest.raises(CheckpointError, match="is of format 2"),
    ):
        Run(tmp_path).checkpoints.resume()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 5}, r"saved with 3 experts, the model has 5.*num_experts=3.*resize"),
        ({"variant": "dw"}, "of another model"),
        ({"layers": (0,)}, "of another model"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    two_checkpoints: tuple[Path, Any], settings: dict[str, Any], message: str
) -> None:
    run = Run(two_checkpoints[0], **settings)
    before = run.state()
    with pytest.raises(CheckpointError, match=message):
        run.checkpoints.resume()
    assert_equal([run.state()], before)


def test_an_optimizer_with_other_groups_is_refused_and_can_be_left_out(
    two_checkpoints: tuple[Path, Any],
) -> None:
    run = Run(two_checkpoints[0])
    before = run.state()
    optimizer = torch.optim.AdamW(run.model.parameters())
    checkpoints = Checkpoints(two_checkpoints[0], {"model": run.model, "optimizer": optimizer})
    with pytest.raises(CheckpointError, match=r"is in group \d only .*leave_out=\['optimizer'\]"):
        checkpoints.resume()
    assert_equal([run.state()], before)
    assert checkpoints.resume(leave_out=["optimizer"]) == 4


def test_a_part_that_was_not_saved_is_named(two_checkpoints: tuple[Path, Any]) -> None:
    run = Run(two_checkpoints[0])
    parts = {"model": run.model, "scaler": torch.amp.GradScaler("cpu")}
    with pytest.raises(CheckpointError, match=r"lacks 'scaler'.*leave_out=\['scaler'\]"):
        Checkpoints(two_checkpoints[0], parts).resume()


def test_a_model_without_memory_is_refused(two_checkpoints: tuple[Path, Any]) -> None:
    run = Run(two_checkpoints[0])
    with pytest.raises(CheckpointError, match="on the meta device"):
        Checkpoints(two_checkpoints[0], {"model": run.model.to("meta")}).resume()


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


class FullDisk:
    """No file can grow beyond 2,000 bytes."""

    def __init__(self) -> None:
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def __enter__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, self._limits[1]))

    def __exit__(self, *error: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_an_error_that_costs_nothing(tmp_path: Path, asynchronous: bool) -> None:
    run = Run(tmp_path, asynchronous=asynchronous).train(0, 3)
    run.checkpoints.save(3)
    run.checkpoints.wait()
    state = run.state()
    run.train(3, 4)

    def save_and_wait() -> None:
        run.checkpoints.save(4)
        run.checkpoints.wait()

    with FullDisk(), pytest.raises(CheckpointError, match="step 4 could not be written"):
        save_and_wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003"]
    assert_equal([resumed(tmp_path).state()], state)
    run.train(4, 5).checkpoints.save(5)  # there is room again
    run.checkpoints.wait()
    assert Run(tmp_path).checkpoints.resume() == 5


def test_state_that_no_file_can_hold_is_an_error(tmp_path: Path) -> None:
    class Part:
        def state_dict(self) -> dict[str, Any]:
            return {"function": print}

        def load_state_dict(self, state: Any) -> None: ...

    with pytest.raises(CheckpointError, match=r"part\.function is a builtin_function"):
        Checkpoints(tmp_path, {"part": Part()}).save(1)
    assert not list(tmp_path.glob("step-*"))


@pytest.mark.parametrize("numbers", [(3, 5), (4, 2), (5, 3), (2, 9)])
@pytest.mark.parametrize(
    "config",
    [
        *({"variant": v, "fuse_on": m} for v in ("sw", "dw", "mb") for m in ("forward", "step")),
        {"fuse_on": "step", "optimizer": torch.optim.AdamW},
    ],
    ids=str,
)
def test_other_numbers_of_experts_fuse_to_the_same_weights(
    tmp_path: Path, config: dict[str, Any], numbers: tuple[int, int]
) -> None:
    run = Run(tmp_path, num_experts=numbers[0], **config).train(0, 3)
    run.checkpoints.save(3)
    other = Run(tmp_path, num_experts=numbers[1], **config)
    assert other.checkpoints.resume(resize_experts=True) == 3
    for name, tensor in exf.fused_state_dict(run.model).items():
        torch.testing.assert_close(
            exf.fused_state_dict(other.model)[name], tensor, rtol=0, atol=1e-12
        )
    other.train(3, 5)


@given(
    weights=st.lists(st.floats(0, 2), min_size=1, max_size=9),
    count=st.integers(1, 9),
)
def test_a_resize_keeps_every_weighted_sum(weights: list[float], count: int) -> None:
    before = torch.tensor(weights, dtype=torch.float64)
    if count == len(weights):
        return
    after = resize(before, count)
    assert after.experts.shape == after.shares.shape == (count, len(weights))
    torch.testing.assert_close(after.weights @ after.experts, before, **EXACT)
    torch.testing.assert_close(after.weights.sum(), before.sum(), **EXACT)
    ones = torch.ones(count, dtype=torch.float64)
    torch.testing.assert_close(after.experts.sum(dim=1), ones, **EXACT)
    torch.testing.assert_close(after.shares.sum(dim=1), ones, **EXACT)


@pytest.mark.parametrize(("weights", "count"), [([1.0, -1.0], 3), ([1.0, -1.0, 2.0, 1.0], 2)])
def test_weights_that_cancel_out_cannot_be_resized(weights: list[float], count: int) -> None:
    with pytest.raises(ValueError, match="sum to zero"):
        resize(torch.tensor(weights), count)


def test_a_checkpoint_of_a_run_is_fused_by_the_command(tmp_path: Path) -> None:
    run = Run(tmp_path).train(0, 2)
    run.checkpoints.save(2)
    fuse_checkpoint(tmp_path / "step-00000002/model", tmp_path / "dense.safetensors")
    from safetensors.torch import load_file

    dense = load_file(tmp_path / "dense.safetensors")
    for name, tensor in exf.fused_state_dict(run.model).items():
        torch.testing.assert_close(dense[name], tensor, **EXACT)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
leaves = plain | st.sampled_from([torch.float32, torch.bfloat16, torch.int8])
nested = st.recursive(
    leaves | st.builds(lambda size: torch.arange(size) / 3, st.integers(0, 4)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3)
        | st.sets(st.integers(), max_size=3)
        | st.builds(Counter, st.dictionaries(st.text(max_size=3), st.integers(), max_size=3))
    ),
    max_leaves=12,
)


@given(value=nested)
def test_plain_values_survive_json(value: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(split(value, "x", tensors), allow_nan=False)
    back = join(json.loads(text), tensors)
    assert type(back) is type(value)
    assert same(back, value)


@given(value=st.recursive(plain, lambda v: st.lists(v) | st.dictionaries(st.text(), v)))
def test_malformed_values_are_refused_or_plain(value: Any) -> None:
    for mark in ("tensor", "quantized", "float", "bytes", "dtype", "tuple", "dict", "no such"):
        with contextlib.suppress(CheckpointError):
            join({"__is__": mark, "value": value}, {})


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
