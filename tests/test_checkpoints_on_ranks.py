"""Checkpoints of several processes: exact on as many, and loaded by any other number."""

import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn

import exfusion_param as exf
from exfusion_param.checkpoint import CheckpointError, Checkpoints, StopRequest, fuse_checkpoint
from exfusion_param.checkpoint.run.running_parts import has_unreduced_gradients
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.ranks import on_ranks
from exfusion_testing.runs import Run, assert_equal
from exfusion_testing.sharded import EXACT

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*view tensor:UserWarning")


def mine(rank: int) -> slice:
    size = 8 // distributed.get_world_size()
    return slice(rank * size, (rank + 1) * size)


def run_on(rank: int, folder: Path, **settings: Any) -> Run:
    run = Run(folder, shards=True, fuse_on="step", **settings)
    for module in run.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # so that any number of ranks draws alike
    return run


def train_and_save(
    rank: int, folder: Path, asynchronous: bool, replicas: int = 1
) -> dict[str, Tensor]:
    run = run_on(rank, folder, asynchronous=asynchronous, replicas=replicas)
    run.train(0, 3, mine(rank))
    run.checkpoints.save(3)
    run.train(3, 6, mine(rank))
    run.checkpoints.wait()
    return run.state()


def resume_and_train(rank: int, folder: Path, resize: int = 3) -> dict[str, Tensor]:
    run = run_on(rank, folder, seed=4, num_experts=resize)
    assert run.checkpoints.resume(resize_experts=resize != 3) == 3
    if resize != 3:
        return {name: value.full_tensor() for name, value in _dense(run).items()}
    return run.train(3, 6, mine(rank)).state()


def _dense(run: Run) -> dict[str, Any]:
    return exf.fused_state_dict(run.model)


@pytest.mark.processes
def test_saved_by_two_ranks_it_continues_on_any_number(tmp_path: Path) -> None:
    states = on_ranks(2, train_and_save, tmp_path, True)
    assert_equal(on_ranks(2, resume_and_train, tmp_path), states[0])
    others = on_ranks(4, resume_and_train, tmp_path)
    alone = Run(tmp_path, fuse_on="step", seed=4)
    alone.model[1].p = 0.0  # type: ignore[index, assignment]
    assert alone.checkpoints.resume() == 3
    others.append(alone.train(3, 6).state())
    for state in others:
        for name, tensor in states[0].items():
            torch.testing.assert_close(state[name], tensor, **EXACT)


@pytest.mark.processes
def test_a_job_that_has_lost_a_replica_continues(tmp_path: Path) -> None:
    expected = on_ranks(4, train_and_save, tmp_path, False, 2)[0]
    for state in on_ranks(2, resume_and_train, tmp_path):
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, **EXACT)


@pytest.mark.processes
def test_saved_by_one_process_it_continues_on_two_ranks(tmp_path: Path) -> None:
    alone = Run(tmp_path, fuse_on="step")
    alone.model[1].p = 0.0  # type: ignore[index, assignment]
    alone.train(0, 3).checkpoints.save(3)
    alone.train(3, 6)
    for state in on_ranks(2, resume_and_train, tmp_path):
        for name, tensor in alone.state().items():
            torch.testing.assert_close(state[name], tensor, **EXACT)


@pytest.mark.processes
def test_sharded_pieces_fuse_to_a_dense_model_and_resize(tmp_path: Path) -> None:
    on_ranks(2, train_and_save, tmp_path, False)
    alone = Run(tmp_path, fuse_on="step")
    alone.checkpoints.resume()
    expected = exf.fused_state_dict(alone.model)
    fuse_checkpoint(tmp_path / "step-00000003/model", tmp_path / "dense.safetensors")
    dense = load_file(tmp_path / "dense.safetensors")
    assert dense.keys() == expected.keys()
    resized = on_ranks(2, resume_and_train, tmp_path, 4)
    for state in (dense, *resized):
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, **EXACT)
    pieces = sorted((tmp_path / "step-00000003/model").glob("*.safetensors"))
    of_one_rank = fuse_checkpoint(pieces[1], tmp_path / "again.safetensors")
    assert_equal([load_file(of_one_rank)], dense)
    pieces[0].unlink()
    with pytest.raises(CheckpointError, match="the pieces of .* do not make up a tensor"):
        fuse_checkpoint(pieces[1].parent, tmp_path / "incomplete")


def accumulate(rank: int, folder: Path, resumes: bool) -> dict[str, Tensor]:
    run = run_on(rank, folder)
    if resumes:
        assert run.checkpoints.resume() == 3
    else:
        run.backward(inputs(batch=8, seed=1)[mine(rank)])
        run.checkpoints.save(3)
    run.backward(inputs(batch=8, seed=2)[mine(rank)])
    run.step()
    return run.state()


@pytest.mark.processes
def test_votes_that_wait_for_a_step_are_distributed_again(tmp_path: Path) -> None:
    states = on_ranks(2, accumulate, tmp_path, False)
    for ranks in (1, 4):
        for state in on_ranks(ranks, accumulate, tmp_path, True):
            for name, tensor in states[0].items():
                torch.testing.assert_close(state[name], tensor, **EXACT)


def save_unreduced(rank: int, folder: Path) -> str:
    run = run_on(rank, folder)
    run.model.set_requires_gradient_sync(False)  # type: ignore[operator]
    run.backward(inputs(batch=8, seed=1)[mine(rank)])
    with pytest.raises(CheckpointError) as caught:
        run.checkpoints.save(3)
    return str(caught.value)


@pytest.mark.processes
def test_gradients_that_fsdp_has_not_reduced_are_refused(tmp_path: Path) -> None:
    for message in on_ranks(2, save_unreduced, tmp_path):
        assert "not reduced yet" in message
    assert not list(tmp_path.glob("step-*"))


def test_a_torch_that_keeps_unreduced_gradients_elsewhere_is_an_error() -> None:
    renamed: Any = SimpleNamespace(_get_fsdp_state=lambda: SimpleNamespace(renamed=[]))
    with pytest.raises(CheckpointError, match=f"FSDP2 of torch {re.escape(torch.__version__)}"):
        has_unreduced_gradients(renamed)


def under_ddp(rank: int, folder: Path) -> Any:
    torch.manual_seed(0)
    model = exf.wrap(FFNs(hidden=7).double(), num_experts=3, bank_init="uniform", fuse_on="step")
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = exf.ExpertAdamW(exf.param_groups(model, 0.1), lr=0.02)
    loader = Counted(rank)
    parts = {"model": ddp, "optimizer": optimizer, "loader": loader}
    checkpoints = Checkpoints(folder, parts)
    step = checkpoints.resume()
    assert loader.count == 10 * rank + step
    draws = torch.rand(2)
    for i in range(step, step + 2):
        loss_of(ddp, inputs(batch=8, seed=i)[mine(rank)]).backward()
        optimizer.step()
        optimizer.zero_grad()
        loader.count += 1
    torch.manual_seed(rank)
    checkpoints.save(step + 2)
    return {"step": step + 2, "draws": draws, "state": model.state_dict()}


class Counted:
    """A part with a state of its own on each rank."""

    def __init__(self, rank: int) -> None:
        self.count = 10 * rank

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def refuse(rank: int, folder: Path) -> str:
    model = exf.wrap(FFNs(hidden=7).double(), num_experts=3, bank_init="uniform", fuse_on="step")
    checkpoints = Checkpoints(folder, {"model": model, "loader": Counted(rank)})
    with pytest.raises(CheckpointError) as caught:
        checkpoints.resume()
    assert checkpoints.resume(leave_out=["loader"]) == 4
    return str(caught.value)


@pytest.mark.processes
def test_each_rank_has_its_own_states_under_ddp(tmp_path: Path) -> None:
    on_ranks(2, under_ddp, tmp_path)
    results = on_ranks(2, under_ddp, tmp_path)
    assert [result["step"] for result in results] == [4, 4]
    for rank, result in enumerate(results):
        torch.manual_seed(rank)
        assert torch.equal(result["draws"], torch.rand(2))
    for message in on_ranks(1, refuse, tmp_path):
        assert "loader is not the same on the 2 ranks" in message


def fail_on_one(rank: int, folder: Path) -> list[str]:
    run = run_on(rank, folder).train(0, 2, mine(rank))
    run.checkpoints.save(2)
    messages = []
    if rank == 1:
        original = os.fsync

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        os.fsync = full
    try:
        run.checkpoints.save(3)
    except CheckpointError as error:
        messages.append(str(error))
    if rank == 1:
        os.fsync = original
    assert run.checkpoints.resume() == 2
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000002"]
    return messages


@pytest.mark.processes
def test_a_rank_with_a_full_disk_fails_all_and_hangs_none(tmp_path: Path) -> None:
    for messages in on_ranks(2, fail_on_one, tmp_path):
        assert len(messages) == 1
        assert "could not be written" in messages[0]
        assert "No space left" in messages[0]


def stop_one(rank: int) -> list[bool]:
    stop = StopRequest((signal.SIGUSR1,))
    answers = [stop.received()]
    if rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    return [*answers, stop.received()]


@pytest.mark.processes
def test_ranks_stop_at_the_same_step() -> None:
    assert on_ranks(2, stop_one) == [[False, True], [False, True]]
