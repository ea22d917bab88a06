"""The models of the text recipe, their tokenizer, what they learn from, and their optimizers."""

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from tokenizers import Tokenizer
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset
from transformers import T5Config, T5ForConditionalGeneration
from transformers.optimization import Adafactor

import exfusion_param as exf
from support import corpus, ranks
from support.adamw_scale import AdamWScale
from support.pretraining import Batch

SIZES: dict[str, dict[str, int]] = {  # of T5 v1.1
    "small": {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "base": {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
}

WARMUP = 0.1  # of the steps: nanoT5's 10,000 of the 100,000 that the paper trains for
LAST_RATE = 1e-5  # of nanoT5's cosine


def build(size: str, pieces: int, dropout: float, more: Mapping[str, int]) -> nn.Module:
    """A dense T5 v1.1 with random weights.

    Args:
        size: small, base or large.
        pieces: of the tokenizer.
        dropout: rate.
        more: fields of T5Config that are to be others.
    """
    fields: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    fields |= {"decoder_start_token_id": 0, "dropout_rate": dropout, **SIZES[size], **more}
    config = T5Config(vocab_size=pieces, **fields)
    return T5ForConditionalGeneration(config)


def tokenizer_of(path: Path | None, files: list[Path], pieces: int, out: Path) -> Tokenizer:
    """A tokenizer that is loaded, or trained by the first rank and kept in the run's folder.

    Raises:
        SystemExit: it lacks a special token of T5.
    """
    path = path or out / "tokenizer.json"
    if ranks.is_first() and not path.exists():
        corpus.train_tokenizer(files, pieces).save(str(path))
    distributed.barrier()
    tokenizer = Tokenizer.from_file(str(path))
    for name in (corpus.END, corpus.SENTINELS[0], corpus.SENTINELS[-1]):
        if tokenizer.token_to_id(name) is None:
            raise SystemExit(f"{path} has no {name}: it is not a tokenizer of T5.")
    return tokenizer


def span_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the targets' tokens."""
    inputs, targets = batch
    return model(input_ids=inputs, labels=targets).loss


class ValidationLoss:
    """The loss on texts that are not learned from.

    Args:
        texts: inputs and targets.
        batch_size: texts at once.
        count: how many texts each rank takes.
    """

    def __init__(self, texts: Dataset[Any], batch_size: int, count: int) -> None:
        self.texts, self.batch_size, self.count = texts, batch_size, count

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """`test_loss`, in nats for each token."""
        device = next(model.parameters()).device
        sums = torch.zeros(2, device=device)
        batches = DataLoader(self.texts, self.batch_size)
        for inputs, targets in islice(batches, -(-self.count // self.batch_size)):
            loss = span_loss(model, (inputs.to(device), targets.to(device)))
            sums += torch.stack([loss * len(inputs), loss.new_tensor(len(inputs))])
        distributed.all_reduce(sums)
        return {"test_loss": (sums[0] / sums[1]).item()}


def make_optimizer(
    name: str, model: nn.Module, lr: float, steps: int
) -> tuple[torch.optim.Optimizer, Callable[[int], object]]:
    """An optimizer, and what sets its learning rates before each step.

    Args:
        name: adamwscale, nanoT5's, or adafactor, both with the schedule of its configuration: a
            warm-up from half the rate, a cosine to 1e-5, steps as large as the parameters, no
            decay; or adamw, which nanoT5 found to diverge at its rate.
        model: whose parameters it moves.
        lr: highest learning rate.
        steps: of the run.
    """
    warmup = round(WARMUP * steps)
    given: dict[str, Any] = {"t_in_epochs": False, "warmup_t": warmup}
    optimizer: torch.optim.Optimizer
    if name in ("adamwscale", "adafactor"):
        groups = exf.param_groups(model, weight_decay=0.0)
        if name == "adafactor":
            optimizer = Adafactor(groups, lr=lr, relative_step=False)
        else:
            optimizer = AdamWScale(groups, lr=lr)
        given |= {"t_initial": steps - warmup, "warmup_prefix": True}  # the cosine follows
        given |= {"warmup_lr_init": lr / 2, "lr_min": LAST_RATE}
    else:
        optimizer = exf.ExpertAdamW(exf.param_groups(model, weight_decay=0.01), lr=lr)
        given |= {"t_initial": steps, "warmup_lr_init": 1e-7}
    return optimizer, CosineLRScheduler(optimizer, **given).step_update
