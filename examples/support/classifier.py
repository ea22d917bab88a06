"""Plain fine-tuning of MiniLM on labelled sentences."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR
from tqdm import tqdm
from transformers import AutoTokenizer

import exfusion_param as exf
from support.pretrained import minilm
from support.sentences import Sentences

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Classifier:
    """A model and its tokenizer.

    Args:
        model: a BERT that classifies.
        batch_size: sentences in a batch.
        lr: first learning rate of AdamW, which falls to zero.
    """

    def __init__(self, model: nn.Module, batch_size: int = 32, lr: float = 1e-4) -> None:
        self.model, self.batch_size, self.lr = model.to(DEVICE), batch_size, lr
        self.tokenizer = AutoTokenizer.from_pretrained(minilm())

    def logits(self, texts: list[str]) -> Tensor:
        """Shape (batch, 2). The attention mask keeps padding out of what routers pool over."""
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return self.model(**inputs.to(DEVICE)).logits

    def train(
        self, examples: Sentences, extra_loss: Callable[[nn.Module], Tensor] | None = None
    ) -> Iterator[tuple[int, float]]:
        """One epoch; after each step its number and its loss.

        Args:
            examples: sentences with their labels.
            extra_loss: of the model, after a forward.
        """
        groups = exf.param_groups(self.model, weight_decay=0.01)
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        size = self.batch_size
        batches = [examples[i : i + size] for i in range(0, len(examples), size)]
        scheduler = LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
        self.model.train()
        for step, batch in enumerate(tqdm(batches, leave=False)):
            texts, labels = zip(*batch, strict=True)
            loss = F.cross_entropy(self.logits(list(texts)), torch.tensor(labels, device=DEVICE))
            if extra_loss is not None:
                loss = loss + extra_loss(self.model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            yield step, loss.item()

    def train_through(
        self, examples: Sentences, extra_loss: Callable[[nn.Module], Tensor] | None = None
    ) -> float:
        """One epoch; the seconds that it took."""
        start = time.perf_counter()
        for _ in self.train(examples, extra_loss):
            pass
        return time.perf_counter() - start

    @torch.no_grad()
    def predict(self, texts: list[str]) -> Tensor:
        """Logits in eval mode, shape (len(texts), 2)."""
        self.model.eval()
        return torch.cat([self.logits(texts[i : i + 200]) for i in range(0, len(texts), 200)]).cpu()

    def accuracy(self, examples: Sentences) -> float:
        """Share of the sentences that are classified rightly, in percent."""
        texts, labels = map(list, zip(*examples, strict=True))
        hits = self.predict(texts).argmax(1) == torch.tensor(labels)
        return 100 * hits.float().mean().item()
