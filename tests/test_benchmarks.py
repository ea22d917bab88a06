"""The benchmark that a change is checked against runs, and writes what it has measured."""

import csv
from pathlib import Path

import quick


def test_quick_benchmark_writes_a_ratio_for_each_figure(tmp_path: Path) -> None:
    quick.main(quick.Settings(model="toy", share=0.01, num_experts=(2,), folder=tmp_path))
    with (tmp_path / "quick.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(quick.STEPS) + 2
    for row in rows:
        low, ratio, high = (float(row[name]) for name in ("lowest", "ratio", "highest"))
        assert 0 <= low <= ratio <= high
        assert float(row["milliseconds"]) > 0
