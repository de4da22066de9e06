"""A ResNet-18 for small images, twice: of torch.nn alone, and of fused_ops. Their state_dicts have the same keys.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", arXiv:1512.03385; its stem is a 3 x 3 convolution
with no pooling behind it, as is usual for images of a few dozen pixels.
"""

from __future__ import annotations

import torch.nn.functional as TF
from torch import Tensor, nn

from fused_ops import blocks

STAGES = (2, 2, 2, 2)


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """Without a bias, which the norm behind it would take away again."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


def block_sizes(width: int) -> list[tuple[int, int, int]]:
    """(channels in, channels out, stride) of each block: a stage doubles the channels and halves the image."""
    sizes, inputs = [], width
    for stage, count in enumerate(STAGES):
        for block in range(count):
            sizes.append((inputs, width << stage, 2 if stage and not block else 1))
            inputs = width << stage
    return sizes


class PlainBasicBlock(nn.Module):
    """Basic block of torch.nn: relu(norm(conv(relu(norm(conv(x))))) + shortcut(x))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(inputs, outputs, 3, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = convolution(outputs, outputs, 3)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = TF.relu(self.norm1(self.conv1(x)))
        return TF.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class PlainResNet(nn.Module):
    """ResNet-18 for images (N, H, W), of torch.nn alone.

    Its first stage has a quarter of ImageNet's 64 channels: enough for the digits, and little enough for two cores to
    train both twins in half a minute.
    """

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = convolution(1, width, 3)
        self.stem_norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(PlainBasicBlock(*sizes) for sizes in block_sizes(width)))
        self.head = nn.Linear(width << len(STAGES) - 1, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = TF.relu(self.stem_norm(self.stem(images.unsqueeze(1))))
        return self.head(self.blocks(x).mean((2, 3)))


class FusedResNet(blocks.ResNet):
    """The same model, of fused_ops: each norm's call takes the relu behind it, a block's second the shortcut too."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__(STAGES, width=width, num_classes=classes, in_channels=1)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.unsqueeze(1))
