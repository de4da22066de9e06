"""The models of `train_digits`, each twice: of torch.nn alone, and of fused_ops. Their state_dicts have the same keys.

The twin of torch.nn is what one writes without this package, every add and activation spelt out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import fused_ops

from .resnet import FusedResNet, PlainResNet

IMAGE, PATCH, CLASSES = 8, 2, 10
TOKENS = (IMAGE // PATCH) ** 2


class Attention(nn.Module):
    """Multi-head self-attention, the same in both twins."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(TF.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def mlp(width: int) -> nn.Module:
    """The feed-forward half of a block, the same in both twins."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class PlainBlock(nn.Module):
    """Pre-norm Transformer block of torch.nn: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainVisionTransformer(nn.Module):
    """A Vision Transformer on 2 x 2 patches of 8 x 8 images, of torch.nn alone.

    The embedding has a norm and a gelu of its own, so that the fused twin uses an activation after a norm too.
    """

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, width)
        self.embed_norm = nn.LayerNorm(width)
        self.place = nn.Parameter(0.02 * torch.randn(TOKENS, width))
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = TF.gelu(self.embed_norm(self.embed(patches(images)))) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class FusedBlock(nn.Module):
    """The same block with each add in the norm behind it: takes and returns (branch to be added, residual stream)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = fused_ops.AddLayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = fused_ops.AddLayerNorm(width), mlp(width)

    def forward(self, branch: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        y, stream = self.norm1(branch, stream)
        y, stream = self.norm2(self.attention(y), stream)
        return self.mlp(y), stream


class FusedVisionTransformer(nn.Module):
    """The same model: LayerNorm with gelu in the embedding, AddLayerNorm along the residual stream."""

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, width)
        self.embed_norm = fused_ops.LayerNorm(width, activation="gelu")
        self.place = nn.Parameter(0.02 * torch.randn(TOKENS, width))
        self.blocks = nn.ModuleList(FusedBlock(width, heads) for _ in range(depth))
        self.norm = fused_ops.AddLayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        # The first block adds the embedding to the places, as every other adds its predecessor's branch to the stream.
        branch = self.embed_norm(self.embed(patches(images)))
        stream = self.place.expand_as(branch)
        for block in self.blocks:
            branch, stream = block(branch, stream)
        y, _ = self.norm(branch, stream)
        return self.head(y.mean(1))


def patches(images: Tensor) -> Tensor:
    """Images (N, 8, 8) as tokens (N, 16, 4)."""
    return images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)


@dataclass(frozen=True)
class Twins:
    """A model of torch.nn alone and the same of fused_ops, with the optimizer that each is trained with."""

    plain: Callable[[], nn.Module]
    fused: Callable[[], nn.Module]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

    def build(self, seed: int) -> tuple[nn.Module, nn.Module]:
        """Both with the same parameters."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            plain, fused = self.plain(), self.fused()
        fused.load_state_dict(plain.state_dict())
        return plain, fused


MODELS: Mapping[str, Twins] = {
    "vit": Twins(PlainVisionTransformer, FusedVisionTransformer, functools.partial(torch.optim.AdamW, lr=3e-3)),
    # AdamW divides a gradient by its size, so that one of nearly 0 moves a weight as far as any, and its rounding error
    # is soon seen in the loss.
    "resnet18": Twins(PlainResNet, FusedResNet, functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9)),
}
