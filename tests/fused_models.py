"""Small models as others write them, for the tests of fuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as TF

from tests.norm_cases import DEVICE, normal

Tensor = torch.Tensor


class ResidualBlock(nn.Module):
    """As torchvision's BasicBlock: one module for both activations, an add in place, a shortcut or none."""

    def __init__(self, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None:
            identity = self.shortcut(x)
        out += identity
        return self.relu(out)


class ConvNorm(nn.Module):
    """As transformers' ResNetConvLayer: the norm of a block that adds elsewhere, and does so in place."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class BlockOfParts(nn.Module):
    """As transformers' ResNetBasicLayer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(ConvNorm(nn.ReLU()), ConvNorm(nn.Identity()))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        out += x
        return self.act(out)


class PreNorm(nn.Module):
    """As a Transformer's block, with an option that its callers may leave out."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.mix, self.mlp = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.rate = rate

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        if mask is not None:
            y = y * mask
        x = x + TF.dropout(self.mix(y), self.rate, self.training)
        return x + self.mlp(self.norm2(x))


class NamedOtherwise(nn.Module):
    """An RMS norm by another name, as Llama's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(
            x.dtype
        )


class OnePlusNorm(NamedOtherwise):
    """Gemma's, whose name tells nothing of it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.weight)


MODELS: dict[str, tuple[Any, tuple[int, ...], list[tuple[str, str]]]] = {
    "Sequential": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4), nn.SiLU()),
        (2, 4, 5, 5),
        [("1", "norm+relu"), ("3", "norm+silu")],
    ),
    "ResNet": (
        lambda: nn.Sequential(ResidualBlock(), ResidualBlock(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))),
        (2, 4, 5, 5),
        [
            ("0.bn1", "norm+relu"),
            ("0.bn2", "norm+add+relu"),
            ("1.bn1", "norm+relu"),
            ("1.bn2", "norm+add+relu"),
            ("1.shortcut.1", "norm"),
        ],
    ),
    "a norm in a part, the add outside": (
        lambda: nn.Sequential(BlockOfParts(), BlockOfParts()),
        (2, 4, 5, 5),
        [
            ("0.layer.0.norm", "norm+relu"),
            ("0.layer.1.norm", "norm+add+relu"),
            ("1.layer.0.norm", "norm+relu"),
            ("1.layer.1.norm", "norm+add+relu"),
        ],
    ),
    "Transformer": (
        lambda: nn.Sequential(PreNorm(), PreNorm(0.3)),
        (2, 3, 8),
        [("0.norm1", "norm"), ("0.norm2", "add+norm"), ("1.norm1", "norm"), ("1.norm2", "add+norm")],
    ),
    "RMS norm by another name": (lambda: nn.Sequential(NamedOtherwise(), nn.SiLU()), (3, 8), [("0", "norm+silu")]),
    "a norm itself": (lambda: nn.LayerNorm(8), (3, 8), [("", "norm")]),
}
every_model = pytest.mark.parametrize("name", MODELS)


def made(name: str) -> tuple[nn.Module, Tensor]:
    make, shape, _ = MODELS[name]
    torch.manual_seed(0)
    return make().to(DEVICE), normal(*shape)
