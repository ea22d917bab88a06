"""Dense specialists: of one model with experts, of models of their own, by fine-tuning."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

import exfusion_param as exf
from exfusion_param import meo, study
from support.domains import KINDS, Domain, Pair

TASKS, MIXTURES = "MEO, a task for each domain", "MEO, mixtures of domains"
ARMS = (TASKS, MIXTURES, "one dense model", "dense specialists", "dense, fine-tuned")

Loss = Callable[[list[Pair]], Tensor]
"""Of a model, on the parts of a batch that are of each domain."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of an arm: a dense model for each domain, tested on it.

    Args:
        data: one of KINDS.
        steps: of all models together.
        batch_size: samples of a step.
        experts: of each linear.
    """

    data: str
    steps: int
    batch_size: int
    experts: int

    def __call__(self, run: study.Run) -> dict[str, float]:
        """The mean score over the domains, and each."""
        kind, lr = KINDS[self.data], run.lr
        assert lr is not None
        domains = kind.load(run.tuning)
        torch.manual_seed(run.seed)
        train = self.merged if run.arm in (TASKS, MIXTURES) else self.dense
        models = train(run.arm, domains, lr)
        scores = {
            domain.name: kind.score(model.eval(), domain.test)
            for domain, model in zip(domains, models, strict=True)
        }
        return {"metric": sum(scores.values()) / len(scores)} | scores

    def dense(self, arm: str, domains: list[Domain], lr: float) -> list[nn.Module]:
        """Dense models, whose steps are as many as one model's."""
        build, steps, count = KINDS[self.data].build, self.steps, len(domains)
        start = build()
        if arm == "one dense model":
            self.fit(start, domains, plain(start), steps, lr)
            return [start] * count
        if arm == "dense, fine-tuned":
            steps //= 2
            self.fit(start, domains, plain(start), steps, lr)
        models = []
        for domain in domains:
            model = build()
            model.load_state_dict(start.state_dict())
            self.fit(model, [domain], plain(model), steps // count, lr)
            models.append(model)
        return models

    def merged(self, arm: str, domains: list[Domain], lr: float) -> list[nn.Module]:
        """One model with experts, as the dense one of each domain."""
        build, count = KINDS[self.data].build, len(domains)
        gating: Literal["noisy_top_k", "softmax"] = "noisy_top_k" if arm == TASKS else "softmax"
        config = meo.MEOConfig(
            level="task", task_dim=count, gating=gating, seed=torch.initial_seed()
        )
        model = meo.wrap(build(), config.replace(num_experts=self.experts))
        loss = of_tasks(model) if arm == TASKS else of_mixture(model)
        self.fit(model, domains, loss, self.steps, lr, mixed=arm == MIXTURES)
        shipped = []
        for task in range(count):
            dense = build()
            dense.load_state_dict(meo.fused_state_dict(model, task=task))  # strictly
            shipped.append(dense)
        return shipped

    def fit(
        self,
        model: nn.Module,
        domains: list[Domain],
        loss: Loss,
        steps: int,
        lr: float,
        mixed: bool = False,
    ) -> None:
        """Train on batches with an equal share of each domain, or shares that are drawn."""
        optimizer = torch.optim.AdamW(exf.param_groups(model, weight_decay=0.05), lr=lr)
        schedule = OneCycleLR(optimizer, lr, total_steps=steps + 1, cycle_momentum=False)
        for _ in range(steps):
            shares = torch.ones(len(domains))
            if mixed:
                shares = torch.distributions.Dirichlet(shares / 2).sample()
            loss(self.batch(domains, shares)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    def batch(self, domains: Sequence[Domain], shares: Tensor) -> list[Pair]:
        """Samples of each domain."""
        size = self.batch_size
        chosen = torch.multinomial(shares, size, replacement=True)
        if len(shares) > 1 and shares.min() == shares.max():
            chosen = torch.arange(size) % len(shares)
        parts = []
        for number, domain in enumerate(domains):
            rows = torch.randint(len(domain.train[0]), (int((chosen == number).sum()),))
            parts.append((domain.train[0][rows], domain.train[1][rows]))
        return parts


def plain(model: nn.Module) -> Loss:
    """The mean over the whole batch."""

    def loss(parts: list[Pair]) -> Tensor:
        x, y = (torch.cat(of_all) for of_all in zip(*parts, strict=True))
        return F.cross_entropy(model(x), y)

    return loss


def of_tasks(model: nn.Module) -> Loss:
    """The mean over the domains, each by its own weights."""

    def loss(parts: list[Pair]) -> Tensor:
        losses = []
        for task, (x, y) in enumerate(parts):
            meo.set_task(model, task)
            losses.append(F.cross_entropy(model(x), y))
        return torch.stack(losses).mean() + meo.balance_loss(model)

    return loss


def of_mixture(model: nn.Module) -> Loss:
    """The mean over the whole batch, by the weights of its mixture (arXiv 2502.01804)."""
    whole = plain(model)

    def loss(parts: list[Pair]) -> Tensor:
        counts = torch.tensor([float(len(y)) for _, y in parts])
        meo.set_task(model, counts / counts.sum())
        return whole(parts)

    return loss
