"""A small Llama by torchtitan's order of calls: TP, activation checkpointing, FSDP2, PP, DCP.

    torchrun --nproc-per-node 4 examples/torchtitan_llama.py --tp 2 --out runs/llama

Stop it and run the same command, on another number of ranks or with another --tp or --pp: it
continues after the last checkpoint. torchtitan itself is not needed; docs/torchtitan.md says where
the lines marked "ExFusion" go in it.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, distributed
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import exfusion_param as exf
from support.llama import WORDS, Llama, parallelize
from support.llama_parts import TOKENS, Optimizers, loss_of, schedule_of, state_of


@dataclasses.dataclass
class Settings:
    """Train a Llama under tensor, data and pipeline parallelism."""

    out: Path = Path("runs/llama")  # the folder for checkpoints and the dense model
    tp: int = 1  # ranks that share each linear
    pp: int = 1  # ranks that share the layers; what is left of the ranks shares the data
    dim: int = 64  # features of a token
    layers: int = 4  # Transformer blocks
    num_experts: int = 4  # of each linear
    batch_size: int = 16  # sequences of a step, on all ranks together
    steps: int = 40  # to train in all; more of them continue a run that has ended
    lr: float = 1e-3  # learning rate
    save_every: int = 20  # steps between checkpoints
    smoke: bool = False  # a small model and a few steps, to see that everything works


def build(settings: Settings, mesh: DeviceMesh) -> Llama:
    """The model, or this rank's stage of it; no rank ever holds more than its part."""
    with torch.device("meta"):
        model = Llama(settings.dim, settings.layers)
        # ExFusion; with this bank training starts from the weights that are drawn below
        exf.wrap(model, num_experts=settings.num_experts, fuse_on="step", bank_init="uniform")
    stage, stages = mesh["pp"].get_local_rank(), settings.pp
    for name in [n for n in model.layers if int(n) * stages // settings.layers != stage]:
        del model.layers[name]
    if stage > 0:
        model.tok_embeddings = None
    if stage < stages - 1:
        model.norm = model.output = None
    parallelize(model, mesh)
    model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    model.init_weights()
    return model


def batch_of(step: int, settings: Settings, mesh: DeviceMesh) -> Tensor:
    """This rank's part of a batch: sequences that count up by a step of their own."""
    draw = torch.Generator().manual_seed(step)
    first, by = torch.randint(WORDS, (2, settings.batch_size, 1), generator=draw)
    words = (first + by % 8 * torch.arange(TOKENS + 1)) % WORDS
    return words.chunk(mesh["dp"].size())[mesh["dp"].get_local_rank()]


def main(settings: Settings) -> None:
    """Train, after the last checkpoint if there is one, and export the dense model."""
    if settings.smoke:
        settings.dim, settings.layers, settings.steps = 32, 2, min(settings.steps, 4)
    distributed.init_process_group()  # torchrun says where the other ranks are
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (settings.pp, distributed.get_world_size() // settings.pp // settings.tp, settings.tp)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("pp", "dp", "tp"))
    model = build(settings, mesh)
    optimizers = Optimizers([model], settings.lr)
    stage, stages = mesh["pp"].get_local_rank(), settings.pp
    schedule = schedule_of(model, mesh, settings.batch_size, settings.dim) if stages > 1 else None
    folders = sorted(settings.out.glob("step-*/.metadata"))
    done = int(folders[-1].parent.name.removeprefix("step-")) if folders else 0
    if done:
        state = state_of(model, optimizers)
        load(state, checkpoint_id=folders[-1].parent)
        states.set_model_state_dict(model, state["model"])
        optimizers.load_state_dict(state["optimizer"])
    loss: Any = None
    for step in range(done + 1, settings.steps + 1):
        words = batch_of(step, settings, mesh).to(device)
        if schedule is None:
            loss = loss_of(model(words[:, :-1]), words[:, 1:])
            loss.backward()
        else:
            losses: list[Tensor] = []
            inputs = [words[:, :-1]] if stage == 0 else []
            target = words[:, 1:] if stage == stages - 1 else None
            schedule.step(*inputs, target=target, losses=losses)
            loss = torch.stack(losses).mean() if losses else None
        optimizers.step()
        if step % settings.save_every == 0 or step == settings.steps:
            state = state_of(model, optimizers)
            save(state, checkpoint_id=settings.out / f"step-{step:06}")
    if loss is not None:
        print(f"loss {loss.item():.3f} after {settings.steps} steps")
    if distributed.get_rank() == 0:
        shutil.rmtree(settings.out / "dense", ignore_errors=True)  # parts by other ranks
    distributed.barrier()
    dense = str(settings.out / "dense")
    writer = HuggingFaceStorageWriter(dense, save_distributed=True, enable_consolidation=True)
    save(exf.fused_state_dict(model), storage_writer=writer)  # ExFusion, for model.state_dict()
    distributed.barrier()  # a rank that leaves early would take its connections along
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Settings))
