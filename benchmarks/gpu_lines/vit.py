"""A ViT of torch.nn with timm's names (arXiv 2010.11929), where timm is missing."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZES = {
    "toy": {"patch": 56, "dim": 16, "depth": 2, "heads": 2},
    "demo": {"size": 28, "patch": 7, "dim": 96, "depth": 6, "heads": 3},
    "deit_tiny_patch16_224": {"dim": 192, "heads": 3},
    "vit_base_patch16_224": {"dim": 768, "heads": 12},
}


class Attention(nn.Module):
    """Self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to the same."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class Mlp(nn.Module):
    """The FFN."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to the same."""
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class Block(nn.Module):
    """Attention and FFN; stochastic depth may drop either."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """(batch, tokens, dim) to the same; `keep`, (2, batch), scales the two residuals."""
        first, second = (1.0, 1.0) if keep is None else keep[..., None, None]
        x = x + first * self.attn(self.norm1(x))
        return x + second * self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Classifies images by a class token.

    Args:
        size: pixels of an image.
        patch: pixels of a patch.
        channels: of an image.
        dim: features.
        depth: blocks.
        heads: of attention.
        classes: to tell apart.
    """

    def __init__(
        self,
        size: int = 224,
        patch: int = 16,
        channels: int = 3,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """(batch, channels, size, size) to (batch, classes); `keep` is (depth, 2, batch)."""
        x = self.patch_embed(images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        x = x + self.pos_embed
        for number, block in enumerate(self.blocks):
            x = block(x, None if keep is None else keep[number])
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


def plain_vit(name: str) -> ViT:
    """The ViT that timm has under this name, or the toy.

    Raises:
        SystemExit: it is of another size than those in here.
    """
    if name not in SIZES:
        raise SystemExit(f"{name} needs timm, which is not installed; without it: {list(SIZES)}.")
    return ViT(**SIZES[name])
