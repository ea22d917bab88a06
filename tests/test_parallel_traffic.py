"""What ranks send under tensor and pipeline parallelism is the dense model's, whatever N is."""

import copy
from typing import Any

import pytest

import parallel_traffic as benchmark
from collectives import total
from exfusion_testing.ranks import on_ranks
from traffic import Case

pytestmark = [
    pytest.mark.processes,
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*view tensor:UserWarning"),
]
SETTINGS = benchmark.Settings(dim=32)
MODELS = [Case("step", "sw", 64), Case("step", "mb", 4)]
CASES = [(layout, case) for layout in benchmark.LAYOUTS for case in (Case(), *MODELS)]


@pytest.fixture(scope="module")
def results() -> Any:
    return on_ranks(benchmark.RANKS, benchmark.count_cases, SETTINGS, CASES)


@pytest.mark.parametrize("case", MODELS, ids=[case.variant for case in MODELS])
@pytest.mark.parametrize("layout", benchmark.LAYOUTS)
def test_experts_never_travel(layout: Any, case: Case, results: Any) -> None:
    for of_rank in results:
        dense = of_rank[CASES.index((layout, Case()))]
        seen = of_rank[CASES.index((layout, case))]
        benchmark.check(layout, case, dense, seen, SETTINGS)
        if case.variant == "sw":
            assert seen == dense
        sent_more = copy.deepcopy(seen)
        kind, size = sent_more["forward_and_backward"][0]
        sent_more["forward_and_backward"][0] = (kind, size + 4)
        with pytest.raises(RuntimeError, match=r"PP|TP"):
            benchmark.check(layout, case, dense, sent_more, SETTINGS)


def test_every_kind_of_collective_is_there(results: Any) -> None:
    rows = [of_rank[CASES.index((benchmark.LAYOUTS[0], Case()))] for of_rank in results]
    kinds = {kind for row in rows for kind, _ in row["forward_and_backward"]}
    assert kinds == {"all-gather", "reduce-scatter", "all-reduce"}
    stages = [of_rank[CASES.index((benchmark.LAYOUTS[1], Case()))] for of_rank in results]
    batch, tokens, dim = benchmark.BATCH, benchmark.TOKENS, SETTINGS.dim
    for stage in stages:  # features one way, their gradients the other
        sent = total(stage["forward_and_backward"], kind="send")
        assert sent == 4 * batch // 2 * tokens * dim
