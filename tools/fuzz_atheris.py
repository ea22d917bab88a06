"""Opens made-up checkpoints for as long as it is left to, led by what code they reach.

    pip install atheris
    python tools/fuzz_atheris.py -max_total_time=600

`make faults` changes good files at random; this looks for inputs that reach new lines.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris
from safetensors.torch import save_file
from torch import nn

with atheris.instrument_imports(include=["exfusion_param.checkpoint"]):
    import exfusion_param as exf
    from exfusion_param.checkpoint import fuse_checkpoint, save_config

FOLDER = Path(tempfile.mkdtemp())
CORPUS = FOLDER / "corpus"
PARTS = ("config.json", "model.safetensors")
BREAK = b"\0\xff\0"
"""Between the parts of an input."""


def make_corpus() -> None:
    """One input that is a good checkpoint, for the fuzzer to start from."""
    model = exf.wrap(nn.TransformerEncoderLayer(2, 1, 3), num_experts=2, bank_init="uniform")
    save_config(model, FOLDER)
    save_file(model.state_dict(), FOLDER / "model.safetensors")
    CORPUS.mkdir()
    (CORPUS / "good").write_bytes(BREAK.join((FOLDER / name).read_bytes() for name in PARTS))


def open_one(data: bytes) -> None:
    """Fuse the checkpoint that the bytes make up."""
    for name, content in zip(PARTS, data.split(BREAK, 1), strict=False):
        (FOLDER / name).write_bytes(content)
    with contextlib.suppress(ValueError):  # CheckpointError, or NaN in experts
        fuse_checkpoint(FOLDER, FOLDER / "dense.safetensors")
    (FOLDER / "dense.safetensors").unlink(missing_ok=True)


if __name__ == "__main__":
    make_corpus()
    atheris.Setup([*sys.argv, "-max_len=20000", str(CORPUS)], open_one)
    atheris.Fuzz()
