"""The recipes' defaults are the paper's, and those of the sources that it names."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

import detection
import glue_finetune
import imagenet
import segmentation
import t5_pretrain
from support import schedules
from support.ablation_tables import paper, tables
from support.adamw_scale import AdamWScale
from support.classification import OTHERS, SOURCES
from support.downstream import Segmenter
from support.paper import TABLES
from support.pyramid import Pyramid, backbone
from support.t5 import make_optimizer


def rates(settings_of: Any, count: int) -> list[float]:
    """Those of the first steps, as Pretraining sets them."""
    optimizer, schedule = settings_of
    found = []
    for step in range(count):
        schedule(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


OPTIMIZERS = ("adamwscale", "adafactor")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_t5_warms_up_from_half_its_rate_and_ends_at_nanot5s_last(name: str) -> None:
    made = make_optimizer(name, nn.Linear(3, 2), lr=1e-2, steps=1000)
    found = rates(made, 1000)
    assert found[0] == pytest.approx(5e-3)
    assert max(found) == pytest.approx(1e-2, rel=1e-3)
    assert found.index(max(found)) == pytest.approx(100, abs=1)
    assert found[550] == pytest.approx(0.5 * (1e-2 + 1e-5), rel=1e-3)
    assert found[-1] == pytest.approx(1e-5, rel=0.1)
    assert {group["weight_decay"] for group in made[0].param_groups} == {0.0}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_t5s_steps_are_as_large_as_the_parameters(name: str) -> None:
    torch.manual_seed(0)
    moved = []
    for scale in (1.0, 10.0):
        model = nn.Linear(8, 8, bias=False)
        with torch.no_grad():
            model.weight.mul_(scale)
        before = model.weight.detach().clone()
        optimizer, schedule = make_optimizer(name, model, lr=1e-2, steps=10)
        schedule(0)
        model(torch.ones(4, 8)).square().sum().backward()
        optimizer.step()
        moved.append(((model.weight - before).norm() / before.norm()).item())
    assert moved == pytest.approx([1e-2 / 2] * 2, rel=0.1)


def test_adamwscale_is_adamw_at_a_rate_of_its_own_for_each_parameter() -> None:
    assert t5_pretrain.Settings().optimizer == "adamwscale"
    weights = [nn.Parameter(torch.randn(6, 4, dtype=torch.float64)) for _ in range(2)]
    weights[1].data.copy_(weights[0])
    ours = AdamWScale([weights[0]], lr=1e-2, eps=1e-12, weight_decay=0.0)
    for _ in range(5):
        lr = 1e-2 * weights[1].square().mean().sqrt().item()
        gradient = torch.randn(6, 4, dtype=torch.float64)
        if not ours.state:
            plain = torch.optim.AdamW([weights[1]], lr=lr, eps=1e-12, weight_decay=0.0)
        plain.param_groups[0]["lr"] = lr
        for weight, optimizer in zip(weights, (ours, plain), strict=True):
            weight.grad = gradient
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-12)


HEADS: list[tuple[Any, str, dict[str, float]]] = [
    (segmentation, "fpn", {"steps": 40_000, "batch_size": 32, "lr": 2e-4, "warmup_steps": 0}),
    (segmentation, "upernet", {"steps": 80_000, "batch_size": 16, "lr": 6e-5}),
    (detection, "mask-rcnn", {"lr": 2e-4, "warmup_steps": 500, "steps": 87_960}),
    (detection, "retinanet", {"lr": 1e-4, "warmup_steps": 500, "evaluate_every": 7330}),
]


@pytest.mark.parametrize(("recipe", "head", "expected"), HEADS)
def test_heads_have_their_sources_settings_and_what_is_given_stays(
    recipe: Any, head: Any, expected: dict[str, float]
) -> None:
    is_segmentation = recipe is segmentation
    defaults: Any = (
        schedules.SEGMENTATION[head] if is_segmentation else schedules.detection(head, "pvt_medium")
    )
    settings = recipe.Settings(Path(), head)
    found = dataclasses.asdict(schedules.with_defaults(settings, defaults))
    assert expected.items() <= found.items()
    settings = recipe.Settings(Path(), head, lr=0.5)
    assert schedules.with_defaults(settings, defaults).lr == 0.5
    if head == "fpn":
        assert any("Semantic FPN" in row and "40 K" in row for row in TABLES["III"].rows)


def test_the_largest_pvt_learns_to_detect_from_half_the_images_at_once() -> None:
    found = schedules.detection("retinanet", "pvt_large")
    assert found["lr"] == pytest.approx(1e-4 / 1.4)
    assert found["batch_size"] * found["steps"] == pytest.approx(16 * 87_960, rel=1e-3)
    assert found["steps"] == 12 * found["evaluate_every"]


@pytest.mark.parametrize(
    ("name", "row"),
    [("deit_tiny_patch16_224", "DeiT-T"), ("deit_small_patch16_224", "DeiT-S")],
)
def test_upernet_has_the_papers_parameters(name: str, row: str) -> None:
    model = Segmenter(Pyramid(backbone(name, 224, {}), name), "upernet", 150)
    millions = round(sum(parameter.numel() for parameter in model.parameters()) / 1e6)
    assert TABLES["III"].number(f"UperNet, {row}, 80 K iterations", "parameters") == millions


def test_upernet_decays_neither_norms_nor_positions_and_learns_from_a_second_head() -> None:
    more = {"patch_size": 8, "embed_dim": 12, "depth": 4, "num_heads": 2}
    body = backbone("vit_tiny_patch16_224", 32, more, classes=7)
    model = Segmenter(Pyramid(body), "upernet", 5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = schedules.decayed(model, "upernet", 0.01)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
    kept = {names[id(parameter)].removeprefix("pyramid.body.") for parameter in others["params"]}
    assert {"pos_embed", "cls_token", "norm.weight", "blocks.0.norm1.bias"} <= kept
    assert not any("fc1" in name or "head.1" in name for name in kept)
    assert len(schedules.decayed(model, "fpn", 0.01)) == 1
    images, classes = torch.randn(2, 3, 32, 32), torch.randint(5, (2, 32, 32))
    main, second = model(images)
    assert main.shape == second.shape == (2, 5, 32, 32)
    found = segmentation.pixel_loss(lambda _: [main, second], (images, classes))  # type: ignore[arg-type]
    losses = [nn.functional.cross_entropy(logits, classes) for logits in (main, second)]
    torch.testing.assert_close(found, losses[0] + 0.4 * losses[1])
    assert len(model.eval()(images)) == 1


def test_downstream_rates_warm_up_and_a_short_run_warms_up_less() -> None:
    def of(warmup: int, steps: int) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
        drops = MultiStepLR(optimizer, [steps * 8 // 12, steps * 11 // 12])
        scheduler = schedules.warmed_up(optimizer, drops, warmup, steps)
        found = [optimizer.param_groups[0]["lr"]]
        for _ in range(steps - 1):
            optimizer.step()
            scheduler.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    found = of(500, 120)
    assert found[0] == pytest.approx(1e-3)
    assert found[6] == pytest.approx(0.5, abs=0.01)
    assert found[12:80] == pytest.approx([1.0] * 68)
    assert found[80:110] == pytest.approx([0.1] * 30)
    assert found[110:] == pytest.approx([0.01] * 10)
    assert of(0, 12)[:8] == [1.0] * 8


def test_models_have_their_own_stochastic_depth_and_clip() -> None:
    expected = {"deit_tiny_patch16_224": (0.1, None), "pvt_small": (0.1, None)}
    expected |= {"pvt_medium": (0.3, 1.0), "pvt_large": (0.3, 1.0)}
    for model, (drop_path, clip) in expected.items():
        settings = imagenet.Settings(model=model)
        found = schedules.with_defaults(settings, OTHERS | SOURCES.get(model, {}))
        assert (found.drop_path, found.clip, found.min_lr) == (drop_path, clip, 1e-5)
    assert imagenet.Settings(drop_path=0.0).drop_path == 0.0


def test_glue_fine_tunes_the_fused_model_by_default() -> None:
    assert glue_finetune.Settings().method == "dense"


def test_the_page_and_the_ablations_have_the_papers_figures() -> None:
    text = (Path(__file__).parents[1] / "docs" / "reproduce.md").read_text()
    for number, table in TABLES.items():
        part = text.split(f"## Table {number}: ")[1].split("## ")[0]
        for row, values in table.rows.items():
            assert f"| {' | '.join([row, *values])} |" in part, (number, row)
    for number, ours in tables(12).items():
        assert set(paper(number)) <= set(ours.rows), number
    assert paper("VI")["mb"] == "74.10"
    assert TABLES["I"].number("mb", "memory") == 25_327
