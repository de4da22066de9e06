"""ResNets for small images, and their plain twins.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", arXiv:1512.03385 (version 1; section 4.2 has those
of 20, 56 and 110 layers), and "Identity Mappings in Deep Residual Networks", arXiv:1603.05027 (version 2).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .norms import image_norms
from .residual import BasicBlock, PreActivationBlock, convolution


class ResNet(nn.Module):
    """A 3 x 3 convolution, stages of blocks, the mean over each plane, and a linear layer.

    A stage has twice the channels of the one before, in images half as high and wide. Images have shape
    ``(N, in_channels, H, W)``, the result ``(N, num_classes)``.

    Args:
        stages: how many blocks each stage has, two convolutions a block.
        norm: "batch", "layer", "rms", "group", "instance" or "switch", see `blocks.norms`.
        version: 1, of `BasicBlock`, or 2, of `PreActivationBlock`. Shortcuts that change the shape are 1 x 1
            convolutions in both (option B).
        residual: False is the plain network: the same layers without shortcuts, of either version the same.
        width: channels of the first stage.
        weight_standardization: whether convolutions are `WSConv2d`.

    Raises:
        ValueError: an unknown norm or version.

    Example:
        >>> model = ResNet((1, 1), norm="group", version=2, width=8, weight_standardization=True)
        >>> model(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        stages: Sequence[int],
        norm: str = "batch",
        version: int = 1,
        residual: bool = True,
        width: int = 16,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        weight_standardization: bool = False,
    ) -> None:
        super().__init__()
        if version not in (1, 2):
            raise ValueError(f"version must be 1 (BasicBlock) or 2 (PreActivationBlock), but is {version!r}")
        self.carries_total = residual and version == 2
        block = PreActivationBlock if self.carries_total else functools.partial(BasicBlock, residual=residual)
        self.stem = convolution(in_channels, width, 3, weight_standardization=weight_standardization)
        self.stem_norm = image_norms(norm).norm(width, activation="relu")
        self.blocks = nn.ModuleList()
        channels = width
        for stage, count in enumerate(stages):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                made = block(channels, width << stage, stride, norm=norm, weight_standardization=weight_standardization)
                self.blocks.append(made)
                channels = width << stage
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        y = total = self.stem_norm(self.stem(images))
        for block in self.blocks:
            if self.carries_total:
                y, total = block(y, total)
            else:
                y = block(y)
        return self.head(y.mean((2, 3)))


def resnet18(
    norm: str = "batch",
    version: int = 1,
    residual: bool = True,
    width: int = 16,
    num_classes: int = 10,
    **keywords: Any,
) -> ResNet:
    """ImageNet's ResNet-18 with a stem for small images: four stages of two blocks. Arguments as in `ResNet`.

    Example:
        >>> model = resnet18(width=64, num_classes=100)
    """
    return ResNet((2, 2, 2, 2), norm, version, residual, width, num_classes, **keywords)


def resnet20(
    norm: str = "batch",
    version: int = 1,
    residual: bool = True,
    width: int = 16,
    num_classes: int = 10,
    **keywords: Any,
) -> ResNet:
    """CIFAR's ResNet-20: three stages of 3 blocks. Arguments as in `ResNet`.

    Example:
        >>> plain = resnet20(residual=False)
    """
    return ResNet((3, 3, 3), norm, version, residual, width, num_classes, **keywords)


def resnet56(
    norm: str = "batch",
    version: int = 1,
    residual: bool = True,
    width: int = 16,
    num_classes: int = 10,
    **keywords: Any,
) -> ResNet:
    """CIFAR's ResNet-56: three stages of 9 blocks. Arguments as in `ResNet`.

    Example:
        >>> model = resnet56(version=2)
    """
    return ResNet((9, 9, 9), norm, version, residual, width, num_classes, **keywords)


def resnet110(
    norm: str = "batch",
    version: int = 1,
    residual: bool = True,
    width: int = 16,
    num_classes: int = 10,
    **keywords: Any,
) -> ResNet:
    """CIFAR's ResNet-110: three stages of 18 blocks. Arguments as in `ResNet`.

    Example:
        >>> model = resnet110(norm="group", version=2, weight_standardization=True)
    """
    return ResNet((18, 18, 18), norm, version, residual, width, num_classes, **keywords)
