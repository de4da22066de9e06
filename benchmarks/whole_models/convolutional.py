"""Convolutional models as their authors have them, of torch.nn alone: what a user brings to fuse."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

# (width of the 3 x 3 convolution, blocks) of a ResNet-50's four stages.
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
EXPANSION = 4

Block = Callable[[int, int, int], nn.Module]


class Bottleneck(nn.Module):
    """ResNet v1's block (He et al., arXiv:1512.03385), in torchvision's words: stride in its 3 x 3 convolution."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class StdConv2d(nn.Conv2d):
    """A convolution whose weight is standardized in each call (Qiao et al., arXiv:1903.10520), in BiT's words."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-10)
        return TF.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class PreActivationBottleneck(nn.Module):
    """ResNet v2's block with group norm and standardized weights: BiT's (Kolesnikov et al., arXiv:1912.11370)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.gn1 = nn.GroupNorm(32, inputs)
        self.conv1 = StdConv2d(inputs, width, 1, bias=False)
        self.gn2 = nn.GroupNorm(32, width)
        self.conv2 = StdConv2d(width, width, 3, stride, 1, bias=False)
        self.gn3 = nn.GroupNorm(32, width)
        self.conv3 = StdConv2d(width, outputs, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = StdConv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.gn1(x))
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(self.relu(self.gn2(out)))
        out = self.conv3(self.relu(self.gn3(out)))
        return out + shortcut


def stages(block: Block, width: int) -> nn.Sequential:
    """The 16 blocks; width: channels of the first stage's 3 x 3 convolutions, 64 in the papers."""
    blocks, inputs = [], width
    for stage, (of_64, count) in enumerate(STAGES):
        own = of_64 * width // 64
        for index in range(count):
            blocks.append(block(inputs, own, 2 if stage and not index else 1))
            inputs = EXPANSION * own
    return nn.Sequential(*blocks)


def resnet50(width: int = 64) -> nn.Module:
    """ResNet-50: batch norm, add and ReLU."""
    stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32 * width, 1000)]
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), stages(Bottleneck, width), *head)


def bit50(width: int = 64) -> nn.Module:
    """BiT-ResNet-50: group norm, ReLU and standardized weights."""
    stem = [StdConv2d(3, width, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)]
    last = [nn.GroupNorm(32, 32 * width), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*stem, stages(PreActivationBottleneck, width), *last, nn.Linear(32 * width, 1000))


class UNetBlock(nn.Module):
    """Stable Diffusion's residual block: GroupNorm, SiLU and a 3 x 3 convolution, twice, the time step in between."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1)
        self.time_emb_proj = nn.Linear(time, outputs)
        self.norm2 = nn.GroupNorm(32, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.nonlinearity = nn.SiLU()
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        h = h + self.time_emb_proj(self.nonlinearity(time))[:, :, None, None]
        h = self.conv2(self.nonlinearity(self.norm2(h)))
        return self.conv_shortcut(x) + h


class UNetBlocks(nn.Module):
    """Two such blocks at each of two levels, the time step a parameter in the place of its embedding."""

    def __init__(self, width: int = 320) -> None:
        super().__init__()
        self.time = nn.Parameter(torch.randn(1, 4 * width))
        self.down = nn.ModuleList([UNetBlock(width, width, 4 * width), UNetBlock(width, width, 4 * width)])
        self.downsample = nn.Conv2d(width, width, 3, 2, 1)
        self.up = nn.ModuleList([UNetBlock(width, 2 * width, 4 * width), UNetBlock(2 * width, 2 * width, 4 * width)])

    def forward(self, x: Tensor) -> Tensor:
        time = self.time.expand(x.shape[0], -1)
        for block in self.down:
            x = block(x, time)
        x = self.downsample(x)
        for block in self.up:
            x = block(x, time)
        return x


class CycleGanBlock(nn.Module):
    """CycleGAN's residual block (Zhu et al., arXiv:1703.10593): instance norm, the shortcut added at its end."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
            nn.ReLU(True),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


def cyclegan_generator(width: int = 64, blocks: int = 9) -> nn.Module:
    """CycleGAN's generator: down by 4, nine residual blocks, and up again."""

    def normed(convolution: nn.Module, channels: int) -> list[nn.Module]:
        return [convolution, nn.InstanceNorm2d(channels), nn.ReLU(True)]

    return nn.Sequential(
        nn.ReflectionPad2d(3),
        *normed(nn.Conv2d(3, width, 7), width),
        *normed(nn.Conv2d(width, 2 * width, 3, 2, 1), 2 * width),
        *normed(nn.Conv2d(2 * width, 4 * width, 3, 2, 1), 4 * width),
        *(CycleGanBlock(4 * width) for _ in range(blocks)),
        *normed(nn.ConvTranspose2d(4 * width, 2 * width, 3, 2, 1, 1), 2 * width),
        *normed(nn.ConvTranspose2d(2 * width, width, 3, 2, 1, 1), width),
        nn.ReflectionPad2d(3),
        nn.Conv2d(width, 3, 7),
        nn.Tanh(),
    )
