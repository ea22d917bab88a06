"""The command line."""

import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm

import exfusion_param as exf
from exfusion_param import cli


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    cli.main(list(arguments))
    return capsys.readouterr().out


def test_inspect_prints_the_dry_run_of_a_timm_model(capsys: pytest.CaptureFixture[str]) -> None:
    name = "swin_tiny_patch4_window7_224"
    printed = run(capsys, "inspect", f"timm:{name}")
    assert printed == f"{exf.summarize(timm.create_model(name))}\n"
    assert "24 linears in 12 FFN groups" in printed


def test_inspect_takes_settings_and_globs(capsys: pytest.CaptureFixture[str]) -> None:
    name = "timm:deit_tiny_patch16_224"
    settings = ("--num-experts", "8", "--variant", "dw", "--layers", "0", "1")
    printed = run(capsys, "inspect", name, *settings)
    assert printed.startswith("ExFusion dw, 8 experts: 4 linears in 2 FFN groups\n")
    printed = run(capsys, "inspect", name, "--filter", "*.attn.proj")
    assert "12 linears in 12 FFN groups" in printed


def test_inspect_reads_a_folder_of_transformers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = {"model_type": "bert", "num_hidden_layers": 3, "vocab_size": 99}
    (tmp_path / "config.json").write_text(json.dumps(config))
    printed = run(capsys, "inspect", f"transformers:{tmp_path}")
    assert "6 linears in 3 FFN groups" in printed
    assert "encoder.layer.2.intermediate.dense  3072 x 768" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["timm:no_such_model"], "timm has no model 'no_such_model'"),
        (["timm:resnet18"], "No FFN was found in ResNet"),
        (["torch:vit"], "model must be timm:NAME or transformers:DIR, got 'torch:vit'"),
        (["timm:"], "model must be timm:NAME"),
        (["transformers:nowhere"], "nowhere is not a folder with a config.json"),
        (["timm:deit_tiny_patch16_224", "--filter", "nope"], "The glob 'nope' matches no linear"),
    ],
)
def test_what_cannot_be_done_is_one_message_and_status_1(
    arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=message) as stopped:
        cli.main(["inspect", *arguments])
    assert str(stopped.value).startswith("exfusion: ")


def test_a_config_of_an_unknown_model_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="cannot be built: Unrecognized model"):
        cli.main(["inspect", f"transformers:{tmp_path}"])


@pytest.mark.parametrize("answer", ["y\n", ""])
def test_code_in_a_folder_is_not_run(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.C"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    with pytest.raises(SystemExit, match="cannot be built"):
        cli.main(["inspect", f"transformers:{tmp_path}"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "fields",
    [{"hidden_size": -1}, {"hidden_size": "x"}, {"num_attention_heads": 0}, {"dtype": "x"}],
)
def test_a_config_that_no_model_can_be_built_from_is_one_line(
    fields: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"} | fields))
    with pytest.raises(SystemExit, match="exfusion: transformers:.* cannot be built: .*"):
        cli.main(["inspect", f"transformers:{tmp_path}"])


def test_a_metrics_csv_without_metrics_is_one_line_and_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step\n1\n")
    with pytest.raises(SystemExit, match="exfusion: No column of metrics"):
        cli.main(["plot", str(tmp_path)])
    with pytest.raises(SystemExit, match="has no metrics.csv"):
        cli.main(["plot", str(tmp_path / "nowhere"), "--out", str(tmp_path / "plots")])
    assert not (tmp_path / "plots").exists()


def test_warnings_are_shown_as_before_after_a_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shown = warnings.showwarning
    with pytest.raises(SystemExit):
        cli.main(["plot", str(tmp_path)])
    assert warnings.showwarning is shown


@pytest.mark.processes
def test_the_installed_command_has_help_and_exit_codes() -> None:
    command = Path(sys.executable).parent / "exfusion"
    shown = subprocess.run([command, "inspect", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "exfusion inspect timm:swin_tiny_patch4_window7_224" in shown.stdout
    wrong = subprocess.run([command, "inspect", "x", "--num-experts", "many"], capture_output=True)
    assert wrong.returncode == 2
    failed = subprocess.run([command, "inspect", "x"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr == "exfusion: model must be timm:NAME or transformers:DIR, got 'x'.\n"
