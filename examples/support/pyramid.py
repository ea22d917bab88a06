"""A trained classifier as the backbone of a downstream model, its weights loaded strictly."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from support.classification import PVT_DEPTHS, build

STRIDES = (4, 8, 16, 32)
HEADS = ("head.weight", "head.fc.weight", "classifier.weight")


DROP_PATH = 0.1
"""Rate of stochastic depth in PVT's Semantic FPN and detectors, and in mmsegmentation's DeiT."""


def backbone(name: str, size: int, more: dict[str, Any], classes: int = 1000) -> nn.Module:
    """A dense classifier that takes images of any size.

    Args:
        name: of examples/imagenet.py.
        size: pixels of the images that it was trained on.
        more: what else it is made with.
        classes: that it tells apart.
    """
    sizes = {"dynamic_img_size": True, "dynamic_img_pad": True}
    return build(name, size, classes, more | (sizes if "it_" in name else {}), DROP_PATH)


class Pyramid(nn.Module):
    """The maps of a classifier's features at strides 4, 8, 16 and 32.

    PVT has them; the maps of a ViT, which are all of one size, are resized.

    Args:
        body: a classifier of timm, or PVT of transformers.
        name: of its kind.
    """

    def __init__(self, body: nn.Module, name: str = "") -> None:
        super().__init__()
        self.body, self.name = body, name
        self.depths = PVT_DEPTHS.get(name)
        with torch.no_grad():
            self.channels = [m.shape[1] for m in self.eval()(torch.zeros(1, 3, 64, 64))]
        self.train()

    @classmethod
    def load(cls, folder: Path) -> "Pyramid":
        """The dense model that examples/imagenet.py left in a folder.

        Raises:
            SystemExit: there is none, or it is a mixture.
            RuntimeError: its keys or shapes are not those of the dense model.
        """
        if not (folder / "results.json").exists():
            raise SystemExit(f"{folder} holds no results.json of examples/imagenet.py.")
        settings = json.loads((folder / "results.json").read_text())["settings"]
        if settings["method"] == "moe":
            raise SystemExit(f"{folder} holds a mixture of experts, which is not a dense backbone.")
        weights = load_file(folder / "model.safetensors")
        classes = next(len(w) for n, w in weights.items() if n.endswith(HEADS))
        name, size, more = (settings[key] for key in ("model", "image_size", "model_kwargs"))
        body = backbone(name, size, more, classes)
        body.load_state_dict(weights, strict=True)
        return cls(body, name)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Four maps, shapes (batch, channels, height / stride, width / stride)."""
        maps = self._of_pvt(images) if self.depths else self._of_timm(images)
        height, width = images.shape[-2:]
        sizes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
        return [
            m if m.shape[-2:] == size else F.interpolate(m, size, mode="bilinear")
            for m, size in zip(maps, sizes, strict=True)
        ]

    def _of_timm(self, images: Tensor) -> list[Tensor]:
        body: Any = self.body
        blocks = len(body.feature_info)
        chosen = [-(-blocks * quarter // 4) - 1 for quarter in (1, 2, 3, 4)]
        different = sorted(set(chosen))  # fewer than four in a model of fewer blocks
        maps = body.forward_intermediates(images, different, intermediates_only=True)
        return [maps[different.index(block)] for block in chosen]

    def _of_pvt(self, images: Tensor) -> list[Tensor]:
        pvt: Any = self.body.get_submodule("pvt")
        sizes = [(images.shape[-2] // stride, images.shape[-1] // stride) for stride in STRIDES]
        positions = {
            f"encoder.patch_embeddings.{i}.position_embeddings": _resized(embedding, size)
            for i, (embedding, size) in enumerate(
                zip(pvt.encoder.patch_embeddings, sizes, strict=True)
            )
        }
        # transformers' own resizing of positions takes no size but the model's
        states = functional_call(pvt, positions, images, {"output_hidden_states": True})
        last = torch.tensor(self.depths).cumsum(0).tolist()
        return [
            states.hidden_states[end - 1][:, -height * width :].mT.unflatten(2, (height, width))
            for end, (height, width) in zip(last, sizes, strict=True)
        ]


def _resized(embedding: Any, size: tuple[int, int]) -> Tensor:
    """PVT's position embeddings, shape (1, tokens, features), for maps of another size."""
    positions: Tensor = embedding.position_embeddings
    grid = [side // patch for side, patch in zip(embedding.image_size, embedding.patch_size)]  # noqa: B905
    of_class, of_map = positions.tensor_split([positions.shape[1] - grid[0] * grid[1]], dim=1)
    resized = F.interpolate(of_map.mT.unflatten(2, grid), size, mode="bilinear")
    return torch.cat([of_class, resized.flatten(2).mT], dim=1)
