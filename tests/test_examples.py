"""The examples run in their smoke form."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--smoke", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_minilm_is_fine_tuned_dense_and_upcycled_and_saved_dense(tmp_path: Path) -> None:
    data = tmp_path / "sentences.tsv"
    lines = [f"{i}\t{rating}\tA {word} film." for i, (rating, word) in enumerate(
        [(2.5, "good"), (-1.5, "bad")] * 10
    )]  # fmt: skip
    data.write_text("\n".join(lines))
    out = tmp_path / "out"
    printed = run("upcycle_minilm.py", "--data", str(data), "--out", str(out))
    assert "loaded from disk its logits differ by 0 at most" in printed
    assert "upcycled" in printed
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
