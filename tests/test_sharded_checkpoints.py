"""Sharded models on disk: torch's distributed checkpoints, and dense safetensors for users."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import exfusion_param as exf
from exfusion_param.checkpoint import describe
from exfusion_param.tensors.shards import full_tensor, is_sharded
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.ranks import on_ranks, on_threads
from exfusion_testing.sharded import EXACT, assert_same, mesh_of, my_part, whole_state

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*view tensor:UserWarning")

BATCHES = [inputs(batch=8, seed=seed) for seed in range(4)]
MODES = ["step", "forward"]


def dense_model() -> nn.Module:
    torch.manual_seed(0)
    return FFNs(hidden=7).double()


def config_of(fuse_on: Any, variant: Any = "mb") -> exf.ExFusionConfig:
    return exf.ExFusionConfig(
        variant=variant, fuse_on=fuse_on, num_experts=3, bank_init="uniform", seed=1
    )


class Run:
    """A training run that can be saved and loaded, on any number of ranks."""

    def __init__(self, config: exf.ExFusionConfig, ranks: int) -> None:
        self.model = exf.wrap(dense_model(), config)
        exf.fully_shard(self.model, mesh=mesh_of(ranks))
        self.optimizer = torch.optim.AdamW(exf.param_groups(self.model, 0.1), lr=0.02)

    def train(self, batches: list[Tensor]) -> None:
        for batch in batches:
            loss_of(self.model, batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer
        )


def train_and_save(rank: int, folder: Path, modes: list[Any]) -> None:
    for mode in modes:
        run = Run(config_of(mode), torch.distributed.get_world_size())
        run.train(my_part(rank, BATCHES[:2]))
        run.save(folder / mode)
        writer = HuggingFaceStorageWriter(
            str(folder / mode / "dense"), save_distributed=True, enable_consolidation=True
        )
        dcp.save(exf.fused_state_dict(run.model), storage_writer=writer)


def load_and_train(rank: int, folder: Path, modes: list[Any]) -> list[dict[str, Tensor]]:
    states = []
    for mode in modes:
        run = Run(config_of(mode), torch.distributed.get_world_size())
        run.load(folder / mode)
        run.train(my_part(rank, BATCHES[2:]))
        states.append(whole_state(run.model))
    return states


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and exports of two ranks, after two steps, of each mode."""
    folder = tmp_path_factory.mktemp("saved")
    on_ranks(2, train_and_save, folder, MODES)
    return folder


def from_meta(rank: int, folder: Path, mode: Any) -> dict[str, Tensor]:
    run = Run.__new__(Run)
    with torch.device("meta"):
        run.model = FFNs(hidden=7).double()
    exf.fully_shard(exf.wrap(run.model, config_of(mode)), mesh=mesh_of(2))
    run.model.to_empty(device="cpu")
    run.optimizer = torch.optim.AdamW(exf.param_groups(run.model, 0.1), lr=0.02)
    for tensor in (*run.model.parameters(), *run.model.buffers()):
        torch.nn.init.zeros_(tensor)
    run.load(folder / mode)  # before any forward
    run.train(my_part(rank, BATCHES[2:]))
    return whole_state(run.model)


@pytest.mark.processes
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_loads_into_a_model_from_the_meta_device(saved: Path, mode: Any) -> None:
    states = on_threads(2, from_meta, saved, mode)
    assert_same(states, on_one_rank(config_of(mode), BATCHES).state_dict())


def on_one_rank(config: exf.ExFusionConfig, batches: list[Tensor]) -> nn.Module:
    model = exf.wrap(dense_model(), config)
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.1), lr=0.02)
    for batch in batches:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [1, 4])
def test_saved_on_two_ranks_it_continues_on_others(saved: Path, ranks: int) -> None:
    results = on_ranks(ranks, load_and_train, saved, MODES)
    for mode, *states in zip(MODES, *results, strict=True):
        assert_same(states, on_one_rank(config_of(mode), BATCHES).state_dict())


@pytest.mark.processes
@pytest.mark.parametrize("mode", MODES)
def test_the_export_is_the_dense_model(saved: Path, mode: Any) -> None:
    state = load_file(saved / mode / "dense" / "model-00001-of-00001.safetensors")
    assert_same([state], exf.fused_state_dict(on_one_rank(config_of(mode), BATCHES[:2])))
    dense_model().load_state_dict(state)


def fused_state(rank: int, wrapped: nn.Module, shape: tuple[int, ...]) -> Any:
    model = exf.fully_shard(copy.deepcopy(wrapped), mesh=mesh_of(*shape))
    before = whole_state(model)
    fused = exf.fused_state_dict(model)
    assert all(is_sharded(tensor) for tensor in fused.values())
    assert_same([whole_state(model)], before)
    largest = max(tensor.to_local().numel() for tensor in fused.values())  # type: ignore[attr-defined]
    return {name: full_tensor(tensor) for name, tensor in fused.items()}, largest


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", ["sw", "dw", "mb"])
@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_fused_state_dict_keeps_everything_sharded(
    mode: Any, variant: Any, shape: tuple[int, ...]
) -> None:
    wrapped = exf.wrap(dense_model(), config_of(mode, variant))
    expected = exf.fused_state_dict(wrapped)
    for state, largest in on_threads(4, fused_state, wrapped, shape):
        assert list(state) == list(expected)
        assert_same([state], expected)
        assert largest < max(tensor.numel() for tensor in expected.values())


def loaded_from_whole(rank: int, wrapped: nn.Module, other: dict[str, Tensor]) -> Any:
    model = exf.fully_shard(copy.deepcopy(wrapped), mesh=mesh_of(2))
    x = inputs(seed=7)
    options = dcp.state_dict.StateDictOptions(full_state_dict=True)
    dcp.state_dict.set_model_state_dict(model, copy.deepcopy(other), options=options)
    return whole_state(model), model.eval()(x).detach()


@pytest.mark.parametrize("mode", MODES)
def test_a_whole_checkpoint_of_one_rank_loads_and_the_leaf_follows(mode: Any) -> None:
    other = exf.wrap(dense_model(), config_of(mode), seed=9).eval()
    wrapped, x = exf.wrap(dense_model(), config_of(mode)), inputs(seed=7)
    for state, y in on_threads(2, loaded_from_whole, wrapped, other.state_dict()):
        assert_same([state], other.state_dict())
        torch.testing.assert_close(y, other(x).detach(), **EXACT)


def description(rank: int, wrapped: nn.Module) -> Any:
    return describe(exf.fully_shard(copy.deepcopy(wrapped), mesh=mesh_of(2)))


def test_a_sharded_model_is_described_like_a_whole_one() -> None:
    wrapped = exf.wrap(dense_model(), config_of("step"))
    assert on_threads(2, description, wrapped) == 2 * [describe(wrapped)]
