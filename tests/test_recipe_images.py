"""Scenes, and what a fused backbone is in downstream models: the dense one, everywhere."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import exfusion_param as exf
from support import classification, labelled_images, scenes
from support.downstream import Segmenter, detector
from support.pyramid import Pyramid, backbone

BACKBONES = {
    "vit_tiny_patch16_224": {"patch_size": 8, "embed_dim": 12, "depth": 4, "num_heads": 2},
    "pvt_v2_b0": {},
    "pvt_tiny": {},
}


def test_boxes_hold_their_masks_and_masks_share_no_pixel() -> None:
    drawn = scenes.Scenes(None, train=True, count=20, size=64)
    for number in range(len(drawn)):
        scene = drawn.scene(number)
        assert scene.masks.sum(dim=0).max() <= 1
        assert len(scene.boxes) == len(scene.labels) == len(scene.masks) > 0
        for box, mask in zip(scene.boxes, scene.masks, strict=True):
            left, top, right, bottom = box.int().tolist()
            assert mask[top:bottom, left:right].sum() == mask.sum()
            for inner in (
                mask[top + 1 : bottom, left:right],
                mask[top : bottom - 1, left:right],
                mask[top:bottom, left + 1 : right],
                mask[top:bottom, left : right - 1],
            ):
                assert inner.sum() < mask.sum()


def test_a_scene_is_the_same_each_time_and_tests_are_others() -> None:
    train, test = (scenes.LabelledPixels(None, is_train, 4, 64) for is_train in (True, False))
    torch.testing.assert_close(train[2], train[2], rtol=0, atol=0)
    assert not torch.equal(train[2][0], test[2][0])
    assert set(train[2][1].unique().tolist()) <= set(range(scenes.CLASSES))
    image, targets = scenes.LabelledBoxes(None, train=True, count=4, size=64)[2]
    pixels = train[2][1]
    for label, mask in zip(targets["labels"], targets["masks"], strict=True):
        assert (pixels[mask.bool()] == label).all()
    torch.testing.assert_close(image, train[2][0])


def body(name: str) -> nn.Module:
    torch.manual_seed(0)
    return backbone(name, 32, BACKBONES[name], classes=7)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_pyramid_has_four_strides_at_any_size(name: str) -> None:
    pyramid = Pyramid(body(name), name)
    for size in ((64, 64), (96, 64)):
        maps = pyramid(torch.randn(2, 3, *size))
        expected = [(size[0] // stride, size[1] // stride) for stride in (4, 8, 16, 32)]
        assert [tuple(m.shape[-2:]) for m in maps] == expected
        assert [m.shape[1] for m in maps] == pyramid.channels


def test_pvts_maps_are_those_of_transformers_at_its_own_size() -> None:
    model = body("pvt_tiny").eval()
    images = torch.randn(2, 3, 32, 32)
    last = Pyramid(model, "pvt_tiny").eval()(images)[-1]
    states = model.get_submodule("pvt")(images, output_hidden_states=True).hidden_states
    torch.testing.assert_close(last.flatten(2).mT, states[-2][:, 1:])


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("head", ["fpn", "upernet", "mask-rcnn", "retinanet"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torchvision and torch's meshgrid
def test_a_fused_backbone_is_the_trained_one_in_every_head(name: str, head: Any) -> None:
    trained = exf.wrap(body(name), num_experts=2, bank_init="uniform", seed=0)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    classification.logits_of(trained, torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()

    def downstream(classifier: nn.Module) -> Any:
        torch.manual_seed(1)
        pyramid = Pyramid(classifier, name)
        if head in ("fpn", "upernet"):
            return Segmenter(pyramid, head, 5).eval()
        model = detector(pyramid, head, 5, 64).eval()
        if head == "mask-rcnn":
            model.rpn._post_nms_top_n["testing"] = 50  # of 1000 proposals
            model.roi_heads.detections_per_img = 5  # of 100, each with a mask
        return model

    dense = downstream(body(name))
    fused = body(name)
    fused.load_state_dict(exf.fused_state_dict(trained), strict=True)
    models = [downstream(fused), downstream(trained), downstream(exf.fuse(copy.deepcopy(trained)))]
    assert models[0].state_dict().keys() == dense.state_dict().keys()
    assert models[2].state_dict().keys() == dense.state_dict().keys()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    given = images if head in ("fpn", "upernet") else list(images)
    with torch.no_grad():
        outputs = [model(given) for model in models]
    torch.testing.assert_close(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[0], outputs[1])


def test_ade20ks_files_are_read_with_unlabelled_pixels_left_out(tmp_path: Path) -> None:
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        pixels = np.arange(40 * 30, dtype=np.uint8).reshape(40, 30) % 4
        Image.fromarray(np.stack([pixels] * 3, axis=-1)).save(tmp_path / f"images/{split}/1.jpg")
        Image.fromarray(pixels).save(tmp_path / f"annotations/{split}/1.png")
    train, test, classes = labelled_images.for_segmentation(tmp_path, 32, count=0)
    assert classes == 150
    for data in (train, test):
        image, marks = data[0]
        assert image.shape == (3, 32, 32)
        assert image.max() <= 1
        assert marks.dtype == torch.long
        assert set(marks.unique().tolist()) == {0, 1, 2, scenes.IGNORED}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pycocotools with numpy 2
def test_cocos_files_are_read_and_empty_images_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        for number in (1, 2):
            Image.new("RGB", (50, 40)).save(tmp_path / f"{split}2017/{number}.jpg")
        annotation = {
            "id": 1, "image_id": 1, "category_id": 90, "iscrowd": 0, "area": 100.0,
            "bbox": [10, 5, 10, 10], "segmentation": [[10, 5, 20, 5, 20, 15, 10, 15]],
        }  # fmt: skip
        images = [{"id": n, "file_name": f"{n}.jpg", "width": 50, "height": 40} for n in (1, 2)]
        whole = {"images": images, "annotations": [annotation], "categories": [{"id": 90}]}
        (tmp_path / f"annotations/instances_{split}2017.json").write_text(json.dumps(whole))
    train, test, classes = labelled_images.for_detection(tmp_path, 32, count=0)
    assert (len(train), len(test), classes) == (1, 2, 91)  # type: ignore[arg-type]
    image, targets = test[0]
    assert image.shape == (3, 40, 50)
    assert targets["boxes"].tolist() == [[10, 5, 20, 15]]
    assert targets["labels"].tolist() == [90]
    assert targets["masks"].shape == (1, 40, 50)
