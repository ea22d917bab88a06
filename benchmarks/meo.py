"""What merging k experts costs beside computing with k experts: FLOPs, and time on this machine.

Command: `PYTHONPATH=examples python benchmarks/meo.py`. FLOPs are those of BERT-base with its MLM
head on one sequence of 128 tokens, counted by torch. Times are of a BERT with 6 layers of 384
features; each kind takes turns with a dense twin.
"""

import dataclasses
import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import tyro
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM

from exfusion_param import meo
from exfusion_param.finding.discovery import find_ffns
from support.vanilla_moe import replace_linears
from tables import markdown_table, write_results
from training import DEVICE


@dataclasses.dataclass
class Settings:
    """Count and time.

    Args:
        top_k: each k for the FLOPs.
        timed_k: each k for the times, of 8 experts.
        batch_size: sequences, for the times.
        tokens: of a sequence, for the times.
        rounds: that are timed.
        folder: where the tables go.
    """

    top_k: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    timed_k: tuple[int, ...] = (1, 2, 4, 8)
    batch_size: int = 16
    tokens: int = 64
    rounds: int = 5
    folder: Path = Path(__file__).parent / "results"


@dataclasses.dataclass
class Flops:
    """GFLOPs of a forward, BERT-base with its MLM head, one sequence of 128 tokens.

    Args:
        top_k: k.
        dense: without experts.
        vanilla_moe: k experts compute.
        meo: k of 32 experts are merged.
    """

    top_k: int
    dense: float
    vanilla_moe: float
    meo: float


@dataclasses.dataclass
class Times:
    """Time by the dense model's, k of 8 experts; medians.

    Args:
        top_k: k.
        vanilla_inference: of a forward in eval.
        meo_inference: the same.
        vanilla_training: of a step with AdamW.
        meo_training: the same.
        dense_training_ms: of the dense twin.
    """

    top_k: int
    vanilla_inference: float
    meo_inference: float
    vanilla_training: float
    meo_training: float
    dense_training_ms: float


def with_mixtures(model: nn.Module, num_experts: int, top_k: int) -> nn.Module:
    """Mixtures of linears in the FFNs."""
    names = [name for ffn in find_ffns(model) for name in ffn.linears]
    return replace_linears(model, names, num_experts, top_k)


def gflops(model: nn.Module) -> float:
    """Of a forward in eval."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 128, dtype=torch.long, device="meta"))
    return round(counter.get_total_flops() / 1e9, 2)


def count(top_k: int) -> Flops:
    """On the meta device, where experts take no memory."""

    def base() -> nn.Module:
        with torch.device("meta"):
            return BertForMaskedLM(BertConfig())

    return Flops(
        top_k,
        dense=gflops(base()),
        vanilla_moe=gflops(with_mixtures(base(), top_k, top_k)),
        meo=gflops(meo.wrap(base(), num_experts=32, top_k=top_k)),
    )


class Timed:
    """A model, its batch and its optimizer."""

    def __init__(self, change: Callable[[nn.Module], nn.Module], settings: Settings) -> None:
        torch.manual_seed(0)
        small = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
        model = BertForMaskedLM(BertConfig(**small))  # type: ignore[arg-type]
        self.model = change(model).to(DEVICE)
        shape = (settings.batch_size, settings.tokens)
        self.tokens = torch.randint(30_000, shape, device=DEVICE)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def infer(self) -> float:
        """Seconds of a forward."""
        self.model.eval()
        start = time.perf_counter()
        with torch.no_grad():
            self.model(self.tokens)
        return self._since(start)

    def train(self) -> float:
        """Seconds of a step."""
        self.model.train()
        start = time.perf_counter()
        self.model(self.tokens, labels=self.tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._since(start)

    def _since(self, start: float) -> float:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def measure(top_k: int, settings: Settings) -> Times:
    """Dense, mixture and MEO in turns, after one round that is not timed."""
    kinds: list[Callable[[nn.Module], nn.Module]] = [
        lambda model: model,
        lambda model: with_mixtures(model, 8, top_k),
        lambda model: meo.wrap(model, num_experts=8, top_k=top_k),
    ]
    timed = [Timed(change, settings) for change in kinds]
    rounds = [
        ([each.infer() for each in timed], [each.train() for each in timed])
        for _ in range(settings.rounds + 1)
    ][1:]

    def ratio(phase: int, kind: int) -> float:
        return round(median(times[phase][kind] / times[phase][0] for times in rounds), 2)

    gc.collect()
    return Times(
        top_k,
        vanilla_inference=ratio(0, 1),
        meo_inference=ratio(0, 2),
        vanilla_training=ratio(1, 1),
        meo_training=ratio(1, 2),
        dense_training_ms=round(1e3 * median(times[1][0] for times in rounds), 1),
    )


def main(settings: Settings) -> None:
    """Count, measure, print and write the tables."""
    command = "Command: `PYTHONPATH=examples python benchmarks/meo.py`."
    flops = [count(top_k) for top_k in settings.top_k]
    title = "FLOPs of merging k experts and of computing with k experts"
    note = f"GFLOPs of a forward, BERT-base with MLM head, one sequence of 128 tokens. {command}"
    write_results(settings.folder, "meo_flops", title, note, flops)
    print(markdown_table(flops))
    times = [measure(top_k, settings) for top_k in settings.timed_k]
    note = (
        f"Time by the dense model's: BERT with 6 layers of 384 features, {settings.batch_size} "
        f"sequences of {settings.tokens} tokens, k of 8 experts, float32, {DEVICE}, medians of "
        f"{settings.rounds} rounds. {command}"
    )
    write_results(settings.folder, "meo_time", "Time of MEO and a vanilla mixture", note, times)
    print(markdown_table(times))


if __name__ == "__main__":
    main(tyro.cli(Settings))
