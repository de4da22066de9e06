"""The norms a block can be built with, by name: what each normalizes in an image, and in a sequence.

| name | in images (N, C, H, W): statistics of | in sequences (N, T, C): statistics of |
|---|---|---|
| batch | each channel, over the batch | each channel, over the batch |
| layer | each sample | each position |
| rms | each position | each position |
| group | each group of channels of each sample, see `num_groups` | the same |
| instance | each channel of each sample | the same |
| switch | a learned mixture of instance, layer (of a sample) and batch | the same |

What rms divides by in an image is of the channels at each position, as its users have it (timm's RmsNorm2d). All norms
learn a weight a channel, and all but rms a bias: instance norm too, which in torch learns nothing unless asked to. So a
model with another norm is otherwise the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import modules as m

Make = Callable[..., nn.Module]


class Norms(NamedTuple):
    """What makes the modules of one norm, both of a number of channels and the keyword `activation`."""

    norm: Make
    """A module of (x, residual=None), such as BatchNorm2d."""
    add_norm: Make
    """A module of (x, residual), such as AddBatchNorm2d, with the keyword `dropout_p`."""


class ChannelsMoved(nn.Module):
    """A norm that finds its channels in dim `destination`, for tensors that have them in dim `source`.

    It is given views, and what it returns is viewed back: rows that are not contiguous are copied by a row norm alone,
    and what it then returns has contiguous ones.

    Example:
        >>> norm = ChannelsMoved(fused_ops.RMSNorm(64, activation="silu"), source=1, destination=-1)
        >>> y = norm(torch.randn(2, 64, 16, 16).to(memory_format=torch.channels_last))
    """

    def __init__(self, norm: nn.Module, source: int, destination: int) -> None:
        super().__init__()
        self.norm, self.source, self.destination = norm, source, destination

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        operands = (x,) if residual is None else (x, residual)
        out = self.norm(*(operand.movedim(self.source, self.destination) for operand in operands))
        if isinstance(out, Tensor):
            return out.movedim(self.destination, self.source)
        return tuple(tensor.movedim(self.destination, self.source) for tensor in out)

    def extra_repr(self) -> str:
        return f"source={self.source}, destination={self.destination}"


def num_groups(channels: int) -> int:
    """How many groups a group norm has: as many of one size as there can be with two channels or more, up to 32.

    32 is the number of Wu, He, "Group Normalization", arXiv:1803.08494; groups of one channel would be instance norm.

    Example:
        >>> [num_groups(channels) for channels in (16, 64, 96, 320)]
        [8, 32, 32, 32]
    """
    return max((groups for groups in range(1, 33) if channels % groups == 0 and channels >= 2 * groups), default=1)


def _grouped(norm: Make) -> Make:
    return lambda channels, **keywords: norm(num_groups(channels), channels, **keywords)


def _moved(norm: Make, source: int, destination: int) -> Make:
    return lambda channels, **keywords: ChannelsMoved(norm(channels, **keywords), source, destination)


def _over_channels(norm: Make) -> Make:
    return _moved(norm, 1, -1)


def _over_positions(norm: Make) -> Make:
    return _moved(norm, -1, 1)


def _affine(norm: Make) -> Make:
    return functools.partial(norm, affine=True)


IMAGE_NORMS: Mapping[str, Norms] = {
    "batch": Norms(m.BatchNorm2d, m.AddBatchNorm2d),
    "layer": Norms(functools.partial(m.GroupNorm, 1), functools.partial(m.AddGroupNorm, 1)),
    "rms": Norms(_over_channels(m.RMSNorm), _over_channels(m.AddRMSNorm)),
    "group": Norms(_grouped(m.GroupNorm), _grouped(m.AddGroupNorm)),
    "instance": Norms(_affine(m.InstanceNorm2d), _affine(m.AddInstanceNorm2d)),
    "switch": Norms(m.SwitchNorm2d, m.AddSwitchNorm2d),
}

SEQUENCE_NORMS: Mapping[str, Norms] = {
    "batch": Norms(_over_positions(m.BatchNorm1d), _over_positions(m.AddBatchNorm1d)),
    "layer": Norms(m.LayerNorm, m.AddLayerNorm),
    "rms": Norms(m.RMSNorm, m.AddRMSNorm),
    "group": Norms(_over_positions(_grouped(m.GroupNorm)), _over_positions(_grouped(m.AddGroupNorm))),
    "instance": Norms(_over_positions(_affine(m.InstanceNorm1d)), _over_positions(_affine(m.AddInstanceNorm1d))),
    "switch": Norms(_over_positions(m.SwitchNorm1d), _over_positions(m.AddSwitchNorm1d)),
}


def image_norms(name: str) -> Norms:
    """The norm of this name for images; ValueError where there is none."""
    return _named(name, IMAGE_NORMS)


def sequence_norms(name: str) -> Norms:
    """The norm of this name for sequences; ValueError where there is none."""
    return _named(name, SEQUENCE_NORMS)


def _named(name: str, norms: Mapping[str, Norms]) -> Norms:
    if name not in norms:
        raise ValueError(f"norm must be one of {', '.join(norms)}, but is {name!r}")
    return norms[name]
