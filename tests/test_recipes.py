"""The paper's recipes run, continue where they were stopped, and ship dense models."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
import tyro
from safetensors.torch import load_file

import ablations
import evidence
import exfusion_param as exf
import imagenet
import specialists
import t5_pretrain
from exfusion_param import study
from exfusion_param.checkpoint import StopRequest
from exfusion_testing import processes
from support import corpus, ranks
from support.recipe_runs import Recipe

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = [pytest.mark.examples, pytest.mark.processes]
QUIET = "ignore:'set_vital' is deprecated:UserWarning"


def run(name: str, *arguments: object) -> str:
    return processes.run(EXAMPLES / name, "--smoke", *arguments)


@pytest.fixture
def _jobs_as_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study's runs start as forks; FAKE's as what a study starts them with."""

    def start(command: list[str], stdout: TextIO, env: dict[str, str], **_: Any) -> Any:
        python, path, *arguments = command
        assert python == sys.executable
        script = processes.Script(Path(path), *arguments, env=env)
        code = script.wait()
        stdout.write(script.output + script.error)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(subprocess, "run", start)


def test_a_backbone_is_trained_and_goes_into_every_downstream_model(tmp_path: Path) -> None:
    printed = run("imagenet.py", "--ema", 0.9, "--out", tmp_path / "body")
    found = json.loads((tmp_path / "body" / "results.json").read_text())["rows"][-1]
    loaded = json.loads(re.search(r"shipped and loaded: (.*)", printed).group(1))  # type: ignore[union-attr]
    assert loaded["accuracy"] == found["accuracy"]
    assert loaded["test_loss"] == pytest.approx(found["test_loss"], rel=1e-5)
    for script, head, said in (
        ("segmentation.py", "upernet", r"mean IoU [\d.]+ %"),
        ("detection.py", "retinanet", r"average precision \{.*'map': [\d.]+"),
    ):
        out = tmp_path / head
        arguments = ("--backbone", tmp_path / "body", "--head", head, "--out", out)
        assert re.search(said, run(script, *arguments))
        assert (out / "model.safetensors").exists()


def test_t5_and_its_dense_model_go_into_transformers(tmp_path: Path) -> None:
    from transformers import T5ForConditionalGeneration

    run("t5_pretrain.py", "--out", tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows[-1]["test_loss"] < rows[0]["test_loss"]
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path / "dense").state_dict()
    for name, value in load_file(tmp_path / "model.safetensors").items():
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=0)


def test_a_task_of_glue_is_learned_and_shipped(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        lines = [f"a {word} film\t{i % 2}" for i, word in enumerate(["bad", "good"] * 8)]
        (tmp_path / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]))
    printed = run("glue_finetune.py", "--task", "sst2", "--data", tmp_path, "--out", tmp_path / "o")
    assert re.search(r"dev: accuracy [\d.]+ %, F1 [\d.]+ %", printed)
    assert (tmp_path / "o" / "dense" / "model.safetensors").exists()


@pytest.mark.usefixtures("_jobs_as_forks")
def test_ablations_write_tables_and_run_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tyro.cli(ablations.Settings, args=["--smoke", "--out", str(tmp_path)])
    ablations.main(settings)
    printed = capsys.readouterr().out
    assert "9,216 shared, 46,080 one per linear" in printed
    assert (tmp_path / "IX.md").read_text() in printed
    assert (tmp_path / "IX.svg").exists()
    assert list(tmp_path.rglob("fusion_weights.png"))
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")}
    assert len(written) == 3
    ablations.main(settings)
    assert capsys.readouterr().out == printed
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")} == written


@pytest.mark.usefixtures("_jobs_as_forks")
def test_evidence_names_the_control(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evidence.main(tyro.cli(evidence.Settings, args=["--smoke", "--out", str(tmp_path)]))
    printed = capsys.readouterr().out
    assert "| control |" in printed
    assert "spread of displacements" in printed
    assert (tmp_path / "images" / "small" / "results.svg").exists()


RECIPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "images": (imagenet, {"exfusion": exf.ExFusionConfig(seed=1, fuse_on="step"), "ema": 0.9}),
    "text": (t5_pretrain, {"optimizer": "adamw", "dropout": 0.1}),
}


@pytest.mark.filterwarnings(QUIET)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_stopped_run_ends_as_one_that_was_not(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, fields = RECIPES[recipe]
    if recipe == "text":  # two trainings of a tokenizer may differ
        text = corpus.EMBEDDED / "macbeth.txt.xz"
        corpus.train_tokenizer([text], 300).save(str(tmp_path / "tokenizer.json"))
        fields = fields | {"tokenizer": tmp_path / "tokenizer.json"}

    def train(out: Path, stop_at: int | None) -> dict[str, torch.Tensor] | None:
        steps = iter(range(1, 1000))
        monkeypatch.setattr(StopRequest, "received", lambda self: next(steps) == stop_at)
        settings = dataclasses.replace(module.Settings(out=out, smoke=True), **fields)
        with ranks.job() as device:
            module.main(settings, device)
        path = out / "model.safetensors"
        return load_file(path) if path.exists() else None

    whole = train(tmp_path / "whole", stop_at=None)
    assert train(tmp_path / "parts", stop_at=2) is None
    parts = train(tmp_path / "parts", stop_at=None)
    assert whole is not None
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


@pytest.mark.filterwarnings(QUIET)
def test_micro_batches_make_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    weights = []
    for size in (None, 20):  # of 64
        out = tmp_path / str(size)
        exfusion = exf.ExFusionConfig(seed=0, variant="dw")
        settings = imagenet.Settings(exfusion, out=out, smoke=True, augment=False, lr=1.0)
        settings.micro_batch, settings.drop_path, settings.warmup_epochs = size, 0.0, 0.0
        with ranks.job() as device:
            imagenet.main(settings, device)
        weights.append(load_file(out / "model.safetensors"))
    for name in ("head.weight", "blocks.1.mlp.fc1.weight"):  # a key's bias has no true gradient
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=1e-4)


def test_other_settings_do_not_continue_a_run(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({"lr": 1.0}))
    with pytest.raises(SystemExit, match="a run with other settings"), ranks.job() as device:
        imagenet.main(imagenet.Settings(out=tmp_path, smoke=True), device)
    torch.distributed.destroy_process_group()


FAKE = """
import json, pathlib, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if arguments["--lr"] == "bad":
    sys.exit("no such rate")
out, seed = pathlib.Path(arguments["--out"]), int(arguments["--seed"])
row = {"step": 100, "score": float(arguments["--lr"]) + seed}
common = {"seconds": 1.0, "step_ms": 2.0, "spread": None}
(out / "results.json").write_text(json.dumps({"rows": [row], **common}))
"""


def test_a_recipe_is_a_trial_and_says_what_failed(tmp_path: Path) -> None:
    (tmp_path / "fake.py").write_text(FAKE)
    script, arms = str(tmp_path / "fake.py"), {"control": "--lr 1", "ours": "--lr 2"}
    recipe = Recipe(script, "", tmp_path / "work", "score", length=("--steps", 100_001))
    found = study.compare(recipe, arms, control="control", out=tmp_path, seeds=(0, 1))
    assert found.values("ours") == [2.0, 3.0]
    assert found.results["ours"][0].seconds == 0.2  # 100 steps of 2 ms
    assert found.results["ours"][0].more == {}
    arms["bad"] = "--lr bad"
    with pytest.raises(RuntimeError, match=r"--lr bad .* ended with 1; see .*log\.txt"):
        study.compare(recipe, arms, control="control", out=tmp_path, seeds=(0, 1))
    log = recipe.folder(study.Run("--lr bad", 0)) / "log.txt"
    assert "no such rate" in log.read_text()


def test_a_recipe_gets_the_arguments_of_its_run() -> None:
    recipe = Recipe("r.py", "--common", Path("w"), "score", "--held-out", ("--steps", 100_001))
    longer = study.Run("--arm 'a b'", 3, lr=1e-3, length=1.5)
    own = ["--seed", "3", "--out", f"w/{longer.name}"]
    words = ["--common", "--arm", "a b", "--lr", "0.001"]
    assert recipe.arguments(longer) == [*words, "--steps", "150001", *own]
    tuned = longer._replace(tuning=True)
    assert recipe.arguments(tuned) == [*words, "--held-out", *own[:-1], f"w/{tuned.name}"]


def test_specialists_are_shipped_for_each_domain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    specialists.main(tyro.cli(specialists.Settings, args=["--smoke", "--out", str(tmp_path)]))
    printed = capsys.readouterr().out
    assert "one dense model" in printed
    assert (tmp_path / "corruptions" / "results.md").read_text() in printed
    assert "| arm | as they are | inverted | turned | scrambled |" in printed
