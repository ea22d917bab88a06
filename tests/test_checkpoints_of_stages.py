"""Checkpoints of ranks that hold different models: pipeline stages, and several models in a job."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

import exfusion_param as exf
from exfusion_param.checkpoint import CheckpointError, Checkpoints, StopRequest, fuse_checkpoint
from exfusion_param.tensors import arrival
from exfusion_testing.pipelines import Pipeline, on_one_rank, stages
from exfusion_testing.ranks import on_ranks
from exfusion_testing.step_models import adamw, assert_same, batch, loss_of, wrapped

pytestmark = pytest.mark.processes


def pipeline(rank: int, folder: Path, data: int, is_resumed: bool) -> dict[str, Tensor]:
    run = Pipeline("Interleaved1F1B", "mb", "step", "sharded", data)
    checkpoints = Checkpoints(folder, run.parts())
    if is_resumed:
        assert checkpoints.resume() == 2
        return run.train(range(2, 3)).state()
    run.train(range(2))
    checkpoints.save(2)
    return run.train(range(2, 3)).state()


def test_stages_resume_on_another_number_of_ranks(tmp_path: Path) -> None:
    expected = on_one_rank(4, "mb", "step", range(3))
    for data, is_resumed in ((2, False), (1, True)):
        first, *_, last = on_ranks(2 * data, pipeline, tmp_path, data, is_resumed)
        assert_same(first | last, expected)
    resumed = on_one_rank(
        4, "mb", "step", range(2, 3), lambda parts: Checkpoints(tmp_path, parts).resume()
    )
    assert_same(resumed, expected)
    fused = fuse_checkpoint(tmp_path / "step-00000002/stage-0", tmp_path / "stage-0.safetensors")
    assert fused.is_file()


def two_models(rank: int, folder: Path) -> dict[str, Tensor]:
    """Ranks 0 and 2 train one model, rank 1 another, and rank 3 waits for their results."""
    groups: list[Any] = [distributed.new_group([0, 2]), distributed.new_group([1])]
    if rank == 3:
        return {}
    group, part, parts = groups[rank % 2], rank // 2, 2 - rank % 2
    state: dict[str, Tensor] = {}
    for steps in (range(2), range(2, 3)):
        inner = exf.wrap(wrapped_dense(rank % 2), fuse_on="step", process_group=group, seed=1)
        model = DistributedDataParallel(inner, process_group=group) if parts == 2 else inner
        optimizer = adamw(model)
        checkpoints = Checkpoints(
            folder / f"model-{rank % 2}",
            {"model": model, "optimizer": optimizer},
            process_group=group,
        )
        stop = StopRequest((signal.SIGUSR1,), process_group=group)
        assert checkpoints.resume() == steps[0]
        for step in steps:
            loss_of(model, batch(step, size=8).chunk(parts)[part]).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not stop.received()
        checkpoints.save(steps[-1] + 1)
        state = dict(inner.state_dict())
    return state


def wrapped_dense(seed: int) -> Any:
    return exf.fuse(wrapped("sw", seed=seed))


def test_each_of_several_models_has_a_folder_and_a_group(tmp_path: Path) -> None:
    states = on_ranks(4, two_models, tmp_path)
    for rank in range(3):
        alone = exf.wrap(wrapped_dense(rank % 2), fuse_on="step", seed=1)
        optimizer = adamw(alone)
        for step in range(3):
            loss_of(alone, batch(step, size=8)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_same(states[rank], dict(alone.state_dict()))


def refused(rank: int, folder: Path) -> dict[str, str]:
    said = {}
    stage = stages(2, "mb", "step")[rank]
    own = adamw(stage)
    for name, parts in {
        "model": {"model": stage},
        "optimizer": {f"stage-{rank}": stage, "optimizer": own},
    }.items():
        with pytest.raises(ValueError, match="other tensors") as caught:
            Checkpoints(folder, parts)
        said[name] = str(caught.value)
    checkpoints = Checkpoints(folder, {f"stage-{rank}": stage, f"optimizer-{rank}": own})
    checkpoints.save(1)
    original = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    if rank == 1:
        os.fsync = full
    with pytest.raises(CheckpointError) as failed:
        checkpoints.save(2)
    os.fsync = original
    said["full"] = str(failed.value)
    other = Checkpoints(folder, {f"stage-{1 - rank}": stage})
    with pytest.raises(CheckpointError) as unfit:
        other.resume()
    said["swapped"] = str(unfit.value)
    assert checkpoints.resume() == 1
    arrival.PATIENCE["checkpoints"] = 0.5
    if rank == 0:
        with pytest.raises(RuntimeError) as late:
            Checkpoints(folder, {"model": stage})
        said["late"] = str(late.value)
    return said


def test_what_ranks_do_not_share_is_an_error_on_all_of_them(tmp_path: Path) -> None:
    first, second = on_ranks(2, refused, tmp_path)
    assert "of these 1 did not come to their first checkpoints" in first.pop("late")
    assert first == second
    assert "'model' holds other tensors on rank 1 than on rank 0" in first["model"]
    assert "'optimizer' holds other tensors on rank 1 than on rank 0" in first["optimizer"]
    assert "No space left on device (rank 1)" in first["full"]
    assert "the checkpoint does not match this model" in first["swapped"]
