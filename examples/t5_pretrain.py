r"""The paper's text recipe: T5 learns to fill in spans, with ExFusion and what it is compared with.

    torchrun --nproc-per-node 8 examples/t5_pretrain.py --data /data/c4/en \
        --held-out /data/c4/val --micro-batch 32 --amp
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        --max-restarts 3 examples/t5_pretrain.py --data /data/c4/en --held-out /data/c4/val --amp
    python examples/t5_pretrain.py --model-kwargs d_model 128 d_ff 256 num_layers 3 num_heads 4 \
        --vocabulary 4096 --inputs 128 --batch-size 32 --steps 1000 --evaluate-every 100

The same command continues a run that was stopped or killed.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from timm.utils import random_seed

import exfusion_param as exf
from support import corpus, methods, ranks
from support.experts_apart import displacement_spread
from support.pretraining import Pretraining, start
from support.spans import lengths_for
from support.t5 import ValidationLoss, build, make_optimizer, span_loss, tokenizer_of

DEFAULTS = exf.ExFusionConfig(seed=0)


@dataclasses.dataclass
class Settings:
    """Train a T5 from scratch. The defaults are the paper's and, where it names none, nanoT5's.

    Args:
        exfusion: the settings of ExFusion; their seed is that of the whole run.
        method: exfusion, or what it is compared with (support/methods.py).
        model: a size of T5 v1.1.
        model_kwargs: whole numbers of its T5Config that are to be others.
        data: a folder of text, or of JSON lines with an entry "text" as C4's; .gz and .xz are read
            too. The default are plays that come with the repository.
        held_out: text to measure the loss on, one document in 20; by default `data`, less these.
        fold: which of the 20; runs that choose settings take another than those that test them.
        out: the folder for checkpoints, logs, results.json and the dense model.
        tokenizer: a tokenizer.json with T5's special tokens; by default one is trained on `data`.
        vocabulary: pieces that it is trained to have.
        inputs: tokens that the encoder sees.
        batch_size: texts of a step, on all ranks together.
        micro_batch: texts that a rank's GPU takes at once; by default its share of the step's.
        steps: of the optimizer.
        optimizer: adamwscale, adafactor or adamw, each with a warm-up and a cosine.
        lr: highest learning rate.
        clip: largest norm of the gradients.
        dropout: rate.
        evaluate_every: steps between two measurements of the loss.
        evaluate_texts: texts to measure it on, on each rank.
        save_every: steps between checkpoints.
        amp: forward in bfloat16.
        workers: processes that read text on each rank.
        smoke: a tiny model and a few steps, to see that everything works.
    """

    exfusion: Annotated[exf.ExFusionConfig, tyro.conf.OmitArgPrefixes] = DEFAULTS
    method: methods.Name = "exfusion"
    model: Literal["small", "base", "large"] = "base"
    model_kwargs: dict[str, int] = dataclasses.field(default_factory=dict)
    data: Path | None = None
    held_out: Path | None = None
    fold: int = 0
    out: Path = Path("runs/t5")
    tokenizer: Path | None = None
    vocabulary: int = 32_000
    inputs: int = 512
    batch_size: int = 2048
    micro_batch: int | None = None
    steps: int = 100_000
    optimizer: Literal["adamwscale", "adafactor", "adamw"] = "adamwscale"
    lr: float = 1e-2
    clip: float = 1.0
    dropout: float = 0.0
    evaluate_every: int = 1000
    evaluate_texts: int = 1024
    save_every: int = 1000
    amp: bool = False
    workers: int = 1
    smoke: bool = False


SMOKE: dict[str, Any] = {
    "data": corpus.EMBEDDED / "macbeth.txt.xz",
    "model_kwargs": {"d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8},
    "vocabulary": 300,
    "inputs": 32,
    "batch_size": 8,
    "steps": 6,
    "evaluate_every": 3,
    "evaluate_texts": 16,
    "save_every": 3,
    "workers": 0,
}


def main(settings: Settings, device: torch.device) -> None:
    """Train, and ship the dense model."""
    if settings.smoke:
        settings = dataclasses.replace(settings, **SMOKE)
    seed = start(settings.out, settings, settings.exfusion.seed)
    files = corpus.files_in(settings.data or corpus.EMBEDDED)
    unseen = files if settings.held_out is None else corpus.files_in(settings.held_out)
    tokenizer = tokenizer_of(settings.tokenizer, files, settings.vocabulary, settings.out)
    pieces, lengths = tokenizer.get_vocab_size(), lengths_for(settings.inputs)

    def prepare() -> methods.Method:
        torch.manual_seed(seed)  # the same weights for every method
        dense = build(settings.model, pieces, settings.dropout, settings.model_kwargs)
        return methods.prepare(settings.method, dense, settings.exfusion.replace(seed=seed))

    method = prepare()
    method.model.to(device)
    random_seed(seed, ranks.place()[0])  # what each rank draws for itself
    steps, share = settings.steps, ranks.share(settings.batch_size)
    optimizer, schedule = make_optimizer(settings.optimizer, method.model, settings.lr, steps)
    spans = partial(corpus.CorruptedSpans, lengths=lengths, seed=seed, fold=settings.fold)
    training, testing = spans(files, tokenizer), spans(unseen, tokenizer, held_out=True)
    run = Pretraining(
        out=settings.out,
        method=method,
        optimizer=optimizer,
        loader=ranks.stream(training, settings.batch_size, settings.workers),
        loss=span_loss,
        schedule=schedule,
        evaluate=ValidationLoss(testing, share, settings.evaluate_texts),
        steps=steps,
        evaluate_every=settings.evaluate_every,
        save_every=settings.save_every,
        micro_batch=settings.micro_batch,
        clip=settings.clip,
        amp=settings.amp,
    )
    if run.train():
        spread = displacement_spread(method.model, prepare().model)
        shipped: Any = run.finish(settings, spread=spread)
        shipped.save_pretrained(settings.out / "dense", is_main_process=ranks.is_first())


if __name__ == "__main__":
    with ranks.job() as device:
        main(tyro.cli(Settings), device)
