"""Models for pixels and boxes around a backbone: heads of well-kept libraries, unchanged."""

from collections import OrderedDict
from typing import Any, Literal

from segmentation_models_pytorch.base import SegmentationHead
from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from support.pretraining import Batch
from support.pyramid import Pyramid
from support.scenes import IGNORED

WIDTH = 256  # of the pyramid's maps
UPERNET_WIDTH = 512  # of UPerNet's, in mmsegmentation
DROPOUT = 0.1  # before each last convolution, as there
AUXILIARY = 0.4  # weight of the auxiliary head's loss, as there


class Segmenter(nn.Module):
    """Semantic FPN (arXiv 1901.02446) or UPerNet (1807.10221), by segmentation_models_pytorch.

    UPerNet has an auxiliary head on the last map, as mmsegmentation's; only training uses it.

    Args:
        pyramid: the backbone.
        head: of the two.
        classes: of a pixel.
    """

    def __init__(self, pyramid: Pyramid, head: Literal["fpn", "upernet"], classes: int) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.decoder: Any
        self.auxiliary: nn.Sequential | None = None
        if head == "fpn":
            self.above: list[None] = []
            self.decoder = FPNDecoder(pyramid.channels, encoder_depth=4, dropout=DROPOUT)
            self.head = SegmentationHead(self.decoder.out_channels, classes, kernel_size=1)
            return
        self.above = [None, None]  # maps at strides 1 and 2, which it does not look at
        channels = [0, 0, *pyramid.channels]
        self.decoder = UPerNetDecoder(channels, decoder_channels=UPERNET_WIDTH)
        self.head = nn.Sequential(nn.Dropout2d(DROPOUT), nn.Conv2d(UPERNET_WIDTH, classes, 1))
        self.auxiliary = nn.Sequential(
            nn.Conv2d(channels[-1], WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            nn.Dropout2d(DROPOUT),
            nn.Conv2d(WIDTH, classes, 1),
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits, shape (batch, classes, height, width), and in training the auxiliary head's."""
        maps = self.pyramid(images)
        logits = [self.head(self.decoder([*self.above, *maps]))]
        if self.auxiliary is not None and self.training:
            logits.append(self.auxiliary(maps[-1]))
        return [F.interpolate(each, images.shape[-2:], mode="bilinear") for each in logits]


def pixel_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the pixels that have a class, and a share of the auxiliary head's."""
    images, classes = batch
    loss, *others = (
        F.cross_entropy(logits, classes, ignore_index=IGNORED) for logits in model(images)
    )
    return loss + AUXILIARY * sum(others)


class Levels(nn.Module):
    """A backbone with torchvision's feature pyramid, as its detectors take it.

    Args:
        pyramid: the backbone.
        first: the number of the finest map that is used.
        more: makes coarser ones.
    """

    def __init__(self, pyramid: Pyramid, first: int, more: Any) -> None:
        super().__init__()
        self.pyramid, self.first = pyramid, first
        self.fpn = FeaturePyramidNetwork(pyramid.channels[first:], WIDTH, more)
        self.out_channels = WIDTH

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps by their names, from fine to coarse."""
        maps = self.pyramid(images)[self.first :]
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(maps)))


def detector(
    pyramid: Pyramid, head: Literal["mask-rcnn", "retinanet"], classes: int, size: int
) -> nn.Module:
    """Mask R-CNN (arXiv 1703.06870) or RetinaNet (arXiv 1708.02002), by torchvision.

    Args:
        pyramid: the backbone.
        head: of the two.
        classes: of an object; 0 is the background.
        size: pixels of the images' shorter side.
    """
    sizes = {"min_size": size, "max_size": size * 1333 // 800}
    small = size / 800  # objects of smaller images are smaller
    if head == "mask-rcnn":
        anchors = AnchorGenerator(
            tuple((max(4, int(side * small)),) for side in (32, 64, 128, 256, 512)),
            ((0.5, 1.0, 2.0),) * 5,
        )
        levels = Levels(pyramid, 0, LastLevelMaxPool())
        return MaskRCNN(levels, classes, rpn_anchor_generator=anchors, **sizes)
    octaves = [
        tuple(max(4, int(side * small * 2 ** (i / 3))) for i in range(3))
        for side in (32, 64, 128, 256, 512)
    ]
    anchors = AnchorGenerator(tuple(octaves), ((0.5, 1.0, 2.0),) * 5)
    levels = Levels(pyramid, 1, LastLevelP6P7(WIDTH, WIDTH))
    return RetinaNet(levels, classes, anchor_generator=anchors, **sizes)
