"""The blocks of residual networks for images (N, C, H, W), versions 1 and 2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..activation import ActivationLike
from ..modules import WSConv2d
from .norms import Norms, image_norms


def convolution(
    in_channels: int, out_channels: int, size: int, stride: int = 1, *, weight_standardization: bool = False
) -> nn.Conv2d:
    """A convolution that keeps the image (divided by the stride), without a bias, which the norm behind it would undo.

    Initialized by He, Zhang, Ren, Sun, "Delving Deep into Rectifiers", arXiv:1502.01852, by outputs as torchvision's
    ResNets are.
    """
    cls = WSConv2d if weight_standardization else nn.Conv2d
    made = cls(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    return made


class BasicBlock(nn.Module):
    """Residual block of ResNet v1: the shortcut is added before the last activation, both in the last norm's call.

    .. math:: y = \\mathrm{act}(\\mathrm{norm}_2(\\mathrm{conv}_2(\\mathrm{act}(\\mathrm{norm}_1(\\mathrm{conv}_1(x)))))
              + \\mathrm{shortcut}(x))

    x has shape ``(N, in_channels, H, W)``, y ``(N, out_channels, H / stride, W / stride)``; convolutions are 3 x 3. The
    shortcut is x itself, or where shapes differ a 1 x 1 convolution with a norm (the paper's option B).

    Args:
        stride: of the first convolution.
        norm: "batch", "layer", "rms", "group", "instance" or "switch", see `blocks.norms`.
        activation: as in `functional.batch_norm`.
        residual: False leaves out the shortcut and its sum, and is a plain network's pair of layers.
        weight_standardization: whether convolutions are `WSConv2d`.

    Raises:
        ValueError: an unknown norm or activation.

    He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", arXiv:1512.03385.

    Example:
        >>> y = BasicBlock(16, 32, stride=2)(torch.randn(2, 16, 8, 8))
        >>> y.shape
        torch.Size([2, 32, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        norm: str = "batch",
        activation: ActivationLike = "relu",
        residual: bool = True,
        weight_standardization: bool = False,
    ) -> None:
        super().__init__()
        ws, norms = weight_standardization, image_norms(norm)
        self.conv1 = convolution(in_channels, out_channels, 3, stride, weight_standardization=ws)
        self.norm1 = norms.norm(out_channels, activation=activation)
        self.conv2 = convolution(out_channels, out_channels, 3, weight_standardization=ws)
        self.norm2 = norms.norm(out_channels, activation=activation)
        self.shortcut = shortcut_of(in_channels, out_channels, stride, norms, ws) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x))
        return joined(self.norm2, self.conv2(y), x, self.shortcut)


class Bottleneck(nn.Module):
    """Residual block of ResNet v1 with convolutions of 1 x 1, 3 x 3 and 1 x 1, the first two a quarter as wide.

    .. math:: y = \\mathrm{act}(\\mathrm{norm}_3(\\mathrm{conv}_3(\\mathrm{act}(\\mathrm{norm}_2(\\mathrm{conv}_2(
              \\mathrm{act}(\\mathrm{norm}_1(\\mathrm{conv}_1(x)))))))) + \\mathrm{shortcut}(x))

    Shapes, shortcut and arguments as in `BasicBlock`; the stride is that of the 3 x 3 convolution, as torchvision's.

    Raises:
        ValueError: an unknown norm or activation, or out_channels that are no multiple of 4.

    Example:
        >>> y = Bottleneck(64, 256)(torch.randn(2, 64, 8, 8))
        >>> y.shape
        torch.Size([2, 256, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        norm: str = "batch",
        activation: ActivationLike = "relu",
        residual: bool = True,
        weight_standardization: bool = False,
    ) -> None:
        super().__init__()
        width, rest = divmod(out_channels, 4)
        if rest:
            raise ValueError(f"Bottleneck: out_channels must be a multiple of 4, but is {out_channels}")
        ws, norms = weight_standardization, image_norms(norm)
        self.conv1 = convolution(in_channels, width, 1, weight_standardization=ws)
        self.norm1 = norms.norm(width, activation=activation)
        self.conv2 = convolution(width, width, 3, stride, weight_standardization=ws)
        self.norm2 = norms.norm(width, activation=activation)
        self.conv3 = convolution(width, out_channels, 1, weight_standardization=ws)
        self.norm3 = norms.norm(out_channels, activation=activation)
        self.shortcut = shortcut_of(in_channels, out_channels, stride, norms, ws) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x))
        y = self.norm2(self.conv2(y))
        return joined(self.norm3, self.conv3(y), x, self.shortcut)


class PreActivationBlock(nn.Module):
    """Residual block of ResNet v2: norm and activation before each convolution, and nothing on the identity path.

    .. math:: \\mathrm{total}' = \\mathrm{total} +
              \\mathrm{conv}_2(\\mathrm{act}(\\mathrm{norm}_1(\\mathrm{conv}_1(y)))), \\quad
              y' = \\mathrm{act}(\\mathrm{norm}_2(\\mathrm{total}'))

    A block takes and returns what an Add module returns: the total, which is the residual stream, and y, the same after
    the norm and activation that the next block begins with. So each sum and the norm behind it are one module's call,
    blocks follow one another as they are, and the last one's y is what a head reads. The first block's y and total are
    both the stem's output after its norm and activation, as in the paper.

    y and total have shape ``(N, in_channels, H, W)``, the new ones ``(N, out_channels, H / stride, W / stride)``. Where
    these differ the total begins anew, as a 1 x 1 convolution of y. Arguments as in `BasicBlock`, whose parameters have
    the same names; without the residual that block is this one's plain twin as well.

    Raises:
        ValueError: an unknown norm or activation.

    He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", arXiv:1603.05027.

    Example:
        >>> y = total = torch.randn(2, 16, 8, 8).relu()
        >>> for block in (PreActivationBlock(16, 16), PreActivationBlock(16, 32, stride=2)):
        ...     y, total = block(y, total)
        >>> y.shape
        torch.Size([2, 32, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        norm: str = "batch",
        activation: ActivationLike = "relu",
        weight_standardization: bool = False,
    ) -> None:
        super().__init__()
        ws, norms = weight_standardization, image_norms(norm)
        self.conv1 = convolution(in_channels, out_channels, 3, stride, weight_standardization=ws)
        self.norm1 = norms.norm(out_channels, activation=activation)
        self.conv2 = convolution(out_channels, out_channels, 3, weight_standardization=ws)
        self.norm2 = norms.add_norm(out_channels, activation=activation)
        self.shortcut = None
        if changes_shape(in_channels, out_channels, stride):
            self.shortcut = convolution(in_channels, out_channels, 1, stride, weight_standardization=ws)

    def forward(self, y: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        branch = self.conv2(self.norm1(self.conv1(y)))
        y, total = self.norm2(branch, total if self.shortcut is None else self.shortcut(y))
        return y, total


def changes_shape(in_channels: int, out_channels: int, stride: int) -> bool:
    """Whether a block's output has another shape than its input, so that no sum takes both."""
    return stride != 1 or in_channels != out_channels


def shortcut_of(
    in_channels: int, out_channels: int, stride: int, norms: Norms, weight_standardization: bool
) -> nn.Sequential:
    """What version 1 has beside its convolutions: nothing, or a projection where shapes differ."""
    if not changes_shape(in_channels, out_channels, stride):
        return nn.Sequential()
    conv = convolution(in_channels, out_channels, 1, stride, weight_standardization=weight_standardization)
    return nn.Sequential(conv, norms.norm(out_channels))


def joined(norm: nn.Module, branch: Tensor, x: Tensor, shortcut: nn.Module | None) -> Tensor:
    """The last norm of a block of version 1, with the shortcut in its call if there is one."""
    if shortcut is None:
        return norm(branch)
    residual = shortcut(x)
    # Under autocast a convolution is in half precision and what comes beside it may not be; torch's sum would have this
    # type too.
    dtype = torch.promote_types(branch.dtype, residual.dtype)
    return norm(branch.to(dtype), residual.to(dtype))
