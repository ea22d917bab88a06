"""`make gpu` at toy size on a CPU: every line, its results, and seeds that train as one model."""

import importlib.util
import re
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

import exfusion_param as exf
import gpu
import training
from exfusion_testing import processes
from gpu_lines import augment, batches, evidence, stacked_ffns
from gpu_lines.alone import Alone
from gpu_lines.arms import ARMS, Shape
from gpu_lines.results import Line, Results
from gpu_lines.stacked import Stacked, packed, unpacked
from support import fashion

SEEDS = (0, 1)
SHAPE = Shape(
    patch=14, dim=16, depth=2, heads=2, batch_size=32, limit=64, seeds=SEEDS, warmup=0.0,
    lr=0.01, bf16=False, compile=False,
)  # fmt: skip
PARTED = "samples parted, experts averaged"


@pytest.fixture(scope="module")
def images() -> batches.Images:
    return batches.Images.load(fashion.EMBEDDED, SHAPE, "cpu")


@pytest.mark.processes
def test_all_lines_run_at_toy_size_and_are_not_measured_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evidence, "START", processes.FORKS)
    gpu.main(["--dry", "--out", str(tmp_path)])
    text = (tmp_path / "gpu.md").read_text()
    assert capfd.readouterr().out.endswith(f"{text}\n")
    assert re.findall(r"^## (\w+)", text, re.MULTILINE) == ["tests", "steps", "evidence"]
    assert "Not measured" not in text
    for said in ("| skipped | 57 |", "| step mb | 2 |", "| ExpertAdamW | 2 |", "| stacked |"):
        assert re.search(re.escape(said).replace("57", r"\d+"), text), said
    arms = {line.split(" | ")[0][2:] for line in text.splitlines() if " | 2 | " in line}
    assert set(ARMS) <= arms
    assert re.search(r"\| mb \| 2 \|.*\| 74.10 \|", text)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("[se]*.json")}
    gpu.main(["--dry", "--out", str(tmp_path), "--lines", "steps", "evidence"])
    assert {path: path.stat().st_mtime_ns for path in written} == written


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.main(["--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "sees no GPU: nothing was measured" in printed
    assert not (tmp_path / "out").exists()


def test_a_case_that_fails_leaves_the_others_their_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(Results(tmp_path / "steps.json"), 9.0, "cpu", fashion.EMBEDDED)
    with line.case("first"):
        raise RuntimeError("no Triton\nand more")
    assert (
        capsys.readouterr().out == "first: failed, and the others go on: RuntimeError: no Triton\n"
    )
    assert line.has_time()
    line.last = 10.0
    assert not line.has_time()
    with line.case("second"):
        pass
    assert line.has_time()  # what the first took, which compiled, does not count any more
    monkeypatch.setattr(torch, "compile", lambda _: None)
    assert not line.can_compile()
    line.is_dry = True
    with pytest.raises(RuntimeError, match="no Triton"), line.case("third"):
        raise RuntimeError("no Triton")


def test_a_line_is_ended_with_all_that_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "child"
    script = tmp_path / "line.py"
    script.write_text(
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(mark)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    gpu.run_apart("steps", gpu.parsed(["--out", str(tmp_path)]), 5.0)
    assert "did not stop" in capsys.readouterr().out
    pid = int(mark.read_text())
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("the line's process has left another one running")


def test_a_line_stops_at_its_share_and_the_table_has_what_is_complete(tmp_path: Path) -> None:
    results = Results(tmp_path / "evidence.json")
    results.add("way: stacked", {"way": "stacked", "ms of a step and run": 1.0})
    results.add("way: processes", {"way": "processes", "ms of a step and run": 2.0})
    for seed, accuracy in enumerate((80.0, 82.0)):
        results.add(f"control, seed {seed}", {"arm": "control", "seed": seed, "accuracy": accuracy})
    results.add("mb, seed 1", {"arm": "mb", "seed": 1, "accuracy": 81.0})
    evidence.run(Line(results, 0.0, "cpu", fashion.EMBEDDED, is_dry=True))
    with pytest.raises(SystemExit, match="holds other runs. Take another --out"):
        evidence.run(Line(results, 0.0, "cpu", fashion.EMBEDDED))
    table = evidence.tables(Results(tmp_path / "evidence.json").rows)[0]
    assert [list(row.values())[:4] for row in table] == [
        ["control", 2, "81.00 ± 1.41", None],
        ["mb", 1, "81.00", "-1.00"],
    ]


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm not in stacked_ffns.AFTER_STEP])
def test_stacked_seeds_train_as_the_package_trains_each(arm: str, images: batches.Images) -> None:
    model, alone = Stacked(arm, SEEDS, SHAPE, "cpu"), [Alone(arm, s, SHAPE, "cpu") for s in SEEDS]
    model.optimizer.param_groups[0]["eps"] = model.optimizer.param_groups[1]["eps"] = 1e-3
    together = batches.Batches(images, SHAPE, SEEDS)
    single = [batches.Batches(images, SHAPE, (seed,)) for seed in SEEDS]
    for run in alone:
        for group in run.optimizer.param_groups:
            group["eps"] = 1e-3  # a key's bias has no gradient but rounding
    for step in range(3):
        losses = model.step(together.batch(step), SHAPE.lr)
        pairs = zip(alone, single, strict=True)
        expected = torch.cat([run.step(of.batch(step), SHAPE.lr) for run, of in pairs])
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    for ours, run in zip(model.shipped(), alone, strict=True):
        theirs = run.method.ship(run.method.model)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-5)


def test_parted_tokens_each_go_to_the_expert_of_their_part() -> None:
    model = Stacked(PARTED, SEEDS, SHAPE, "cpu")
    prefix = "blocks.0."
    p = {k[len(prefix) :]: v for k, v in model.state.items() if k.startswith(prefix)}
    x, order = torch.randn(2, 8, 16), torch.stack([torch.randperm(8) for _ in SEEDS])
    y, _ = stacked_ffns.parted(x, p, order)
    for seed, method in enumerate(model.methods):
        experts = method.model.get_submodule("blocks.0.mlp.experts")
        for place, token in enumerate(order[seed].tolist()):
            expected = experts[place // 2](x[seed, token])  # type: ignore[index]
            torch.testing.assert_close(y[seed, token], expected)


@pytest.mark.parametrize("arm", stacked_ffns.AFTER_STEP)
def test_what_follows_a_step_is_what_the_examples_do(arm: str) -> None:
    model = Stacked(arm, SEEDS, SHAPE, "cpu")
    for tensor in model.trained.values():
        tensor.data.add_(torch.randn_like(tensor))
    before = {name: tensor.detach().clone() for name, tensor in model.trained.items()}
    state = {name: value.detach()[0] for name, value in model.state.items()}
    method = model.methods[0]
    method.model.load_state_dict(unpacked(state))
    stacked_ffns.AFTER_STEP[arm](model.trained)
    assert method.after_step is not None
    method.after_step(method.model)
    theirs = packed(dict(method.model.state_dict()))
    for name, tensor in model.trained.items():
        ours, expected, start = tensor.detach()[0], theirs[name], before[name][0]
        if arm == PARTED:
            torch.testing.assert_close(ours, expected)
        else:  # as much of it, with a mean of zero
            change = (ours - start).std().item()
            assert change == pytest.approx((expected - start).std().item(), rel=0.1)
            torch.testing.assert_close((ours - start).mean(0), 0 * start[0], atol=1e-5, rtol=0)


def draws(count: int, **chosen: float) -> torch.Tensor:
    """Numbers that leave an image as it is, but for those that are given."""
    names = ["area", "ratio", "right", "down", "flip", "free"]
    names += ["number", "level", "sign", "applied", "number2", "level2", "sign2", "applied2"]
    names += ["erased", "erased_area", "erased_ratio", "erased_right", "erased_down"]
    usual = {"area": 1.0, "flip": 0.2, "applied": 0.9, "applied2": 0.9, "erased": 0.9} | chosen
    return torch.tensor([[usual.get(name, 0.5) for name in names]]).expand(count, -1)


def augmented(images: batches.Images, **chosen: float) -> torch.Tensor:
    """Grey values from 0 to 255."""
    x = images.train[:8].float() / 255
    y = augment.augment(x, draws(len(x), **chosen), torch.zeros_like(x))
    return 255 * (y * augment.DEVIATION + augment.MEAN)


def test_images_are_cropped_flipped_and_erased(images: batches.Images) -> None:
    plain = images.train[:8].float()
    torch.testing.assert_close(augmented(images), plain, atol=0.05, rtol=0)
    torch.testing.assert_close(augmented(images, flip=0.8), plain.flip(-1), atol=0.05, rtol=0)
    erased = augmented(images, erased=0.1, erased_area=1.0) - plain
    inside = (augment.MEAN * 255 - plain - erased).abs() < 0.05
    assert inside.float().mean().item() == pytest.approx(1 / 3, abs=0.05)
    assert augmented(images, area=0.3).std() > 0


OPERATIONS = {
    5: ImageOps.autocontrast,
    6: ImageOps.equalize,
    7: ImageOps.invert,
    8: lambda image: ImageOps.posterize(image, 1),  # 4 - int(4 * 0.9)
    9: lambda image: ImageOps.solarize(image, 256 - int(256 * 0.9)),
}


@pytest.mark.parametrize("number", OPERATIONS)
def test_operations_are_those_of_pillow(number: int, images: batches.Images) -> None:
    chosen = {"number": (number + 0.5) / augment.OPERATIONS, "applied": 0.1}
    found = augmented(images, **chosen)
    for ours, pixels in zip(found, images.train[:8], strict=True):
        image = OPERATIONS[number](Image.fromarray(pixels[0].numpy()))
        expected = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(28, 28)
        close = (ours[0] - expected).abs() < 2.5
        assert close.float().mean() > 0.97, number


def test_arms_of_a_seed_see_the_same_batches_and_seeds_see_others(images: batches.Images) -> None:
    one, other = (batches.Batches(images, SHAPE, SEEDS).batch(0) for _ in range(2))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert not torch.equal(one.images[0], one.images[1])
    torch.testing.assert_close(one.targets.sum(-1), torch.ones(2, 32))


def test_without_timm_a_plain_vit_of_the_same_shape_takes_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with torch.device("meta"):
        expected = training.new_vit("vit_base_patch16_224")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        plain = training.new_vit("vit_base_patch16_224")
    count, linears = (
        [sum(p.numel() for p in model.parameters()) for model in (expected, plain)],
        [exf.summarize(model).linears for model in (expected, plain)],
    )
    assert count[0] == count[1]
    assert linears[0] == linears[1]
    with pytest.raises(SystemExit, match="vit_huge needs timm"):
        training.new_vit("vit_huge")


def test_blocks_are_found_in_dense_models_too() -> None:
    model = training.new_vit("toy")
    assert training.blocks_of(model) == list(model.blocks)  # type: ignore[arg-type]
