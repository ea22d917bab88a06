"""A checkpoint that is damaged, of another run, or on a full disk costs nothing."""

import copy
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exfusion_param.checkpoint import CheckpointError, Checkpoints
from exfusion_testing.runs import Run, assert_equal, resumed
from fault_files import sealed


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
        ({"variant": "dw"}, "does not match this model"),
        ({"layers": (0,)}, "does not match this model"),
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
