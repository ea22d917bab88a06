r"""One run, many dense specialists: does it beat as many steps of anything else?

    python examples/specialists.py --seeds 0 1 2 3 4 --at-once 2
    python examples/specialists.py --data text --steps 2000

One model with a task for each domain, whose weights are shipped dense for each, beside one dense
model for all domains, dense specialists that share the same number of steps, and a dense model that
is fine-tuned for each domain after half of them. All arms choose their learning rates alike. Stop
it and run the same command: runs that have ended stay.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from exfusion_param import study
from exfusion_param.study.comparison import markdown
from support.domains import KINDS
from support.specializing import ARMS, TASKS, Trial


@dataclasses.dataclass
class Settings:
    """Train one model that is shipped for each domain, and what it is compared with.

    Args:
        data: corruptions or classes of Fashion-MNIST, or text.
        steps: of all models of an arm together.
        batch_size: samples of a step.
        experts: of each linear.
        seeds: of the runs that are compared.
        rates: learning rates of which each arm takes its best.
        tuning_seeds: of the runs that choose rates, tested on held-out training data.
        out: the folder for records and tables.
        at_once: runs at once.
        smoke: a moment, to see that everything works.
    """

    data: Literal["corruptions", "classes", "text"] = "corruptions"
    steps: int = 400
    batch_size: int = 64
    experts: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    tuning_seeds: tuple[int, ...] = (1000,)
    out: Path = Path("runs/specialists")
    at_once: int = 1
    smoke: bool = False


def main(settings: Settings) -> None:
    """Choose learning rates, train, and write tables."""
    if settings.smoke:
        few = {"steps": 8, "seeds": (0, 1), "rates": settings.rates[:1]}
        settings = dataclasses.replace(settings, **few)  # type: ignore[arg-type]
    kind, out = KINDS[settings.data], settings.out / settings.data
    found = study.compare(
        Trial(settings.data, settings.steps, settings.batch_size, settings.experts),
        {arm: arm for arm in ARMS},
        control=TASKS,
        out=out / f"{settings.steps}-steps",
        seeds=settings.seeds,
        rates=settings.rates,
        tuning_seeds=settings.tuning_seeds,
        better="more" if kind.better == "more" else "less",
        at_once=settings.at_once,
        metric=kind.metric,
        settings={"batch_size": settings.batch_size, "experts": settings.experts},
    )
    domains = list(found.results[TASKS][0].more)
    rows = [
        {"arm": arm}
        | {name: str(study.Spread.of([r.more[name] for r in results])) for name in domains}
        for arm, results in found.results.items()
    ]
    text = f"{found}\n\n{markdown(rows)}"
    print(text)
    (out / "results.md").write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Settings))
