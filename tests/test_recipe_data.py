"""What the recipes learn from is what it says it is."""

import pytest
import torch
from timm.data import create_transform

from support import fashion, timm_images


@pytest.mark.parametrize("size", [28, 40])
def test_plain_images_of_a_batch_are_as_timm_prepares_each(size: int) -> None:
    train, test, classes = timm_images.load(None, size, augmentation=None)
    transform = create_transform(
        size, interpolation="bicubic", crop_pct=1.0, **timm_images.NORMALIZE
    )
    single = timm_images.FashionImages(fashion.EMBEDDED, transform)
    batch = train.__getitems__([7, 3, 7])  # type: ignore[attr-defined]
    for (pixels, label), index in zip(batch, [7, 3, 7], strict=True):
        expected, number = single[index]
        if size == 28:
            torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
        assert (pixels - expected).abs().mean() < 0.01  # PIL cuts between the two directions
        assert label == number
        torch.testing.assert_close(train[index][0], pixels, rtol=0, atol=0)
    assert (len(train), len(test), classes) == (12_000, 2_000, 10)  # type: ignore[arg-type]


def test_held_out_images_are_training_images_that_are_not_trained_on() -> None:
    whole, _, _ = timm_images.load(None, 28, augmentation=None)
    seen, unseen, _ = timm_images.load(None, 28, augmentation=None, held_out=True)
    assert len(seen) + len(unseen) == len(whole)  # type: ignore[arg-type]
    for part, index, number in ((unseen, 2, 20), (seen, 0, 1), (seen, 9, 11)):
        torch.testing.assert_close(part[index][0], whole[number][0], rtol=0, atol=0)


def test_a_limit_leaves_images_of_all_classes_and_none_that_are_held_out() -> None:
    """An ImageFolder has its classes one after another."""
    whole, tests, _ = timm_images.load(None, 28, augmentation=None)
    few, same, _ = timm_images.load(None, 28, augmentation=None, limit=4)
    assert (len(few), len(same)) == (4, len(tests))  # type: ignore[arg-type]
    for place in range(4):
        torch.testing.assert_close(few[place][0], whole[3000 * place][0], rtol=0, atol=0)
    seen, _, _ = timm_images.load(None, 28, augmentation=None, held_out=True, limit=2)
    for place, number in ((0, 1), (1, 6001)):
        torch.testing.assert_close(seen[place][0], whole[number][0], rtol=0, atol=0)
    all_of_it, _, _ = timm_images.load(None, 28, augmentation=None, limit=10**6)
    assert len(all_of_it) == len(whole)  # type: ignore[arg-type]
