"""Launches the forward of the channel family: whole groups in one launch, others in pieces, in three."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..activations import ACTIVATIONS
from ..launch import cdiv
from ..launcher import Launcher, Tensors
from ..problem import Forward, GroupNorm, Tensor, compute_dtype
from ..views import columns, empty_samples, sample_view
from .config import (
    GroupPlanes,
    PlaneKind,
    forward_steps,
    group_forward_tile,
    group_planes,
    longest_of,
    piece_tile,
    plane_kind,
    plane_units,
    widest_access,
)
from .forward_kernels import (
    channel_apply_kernel,
    channel_moments_kernel,
    channel_norm_forward_kernel,
    combine_moments_kernel,
)

COMBINED = 1024  # partial moments that a program merges at a time
Floats = tuple[float, float, float]
Schedule = Callable[[int, int, Tensors, Forward, tuple[int, int], Floats], None]


def group_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: GroupNorm,
    *,
    save_statistics: bool = False,
    save_bits: bool = False,
) -> Forward:
    """y and what else is asked for: one launch, or three where groups are too large to hold or not contiguous.

    x is [samples, channels, *positions]; x or a residual is copied where its samples have gaps or another layout than
    the norm's. weight and bias have an element a channel. With save_bits, a bit says that the activation's slope is 1.
    """
    groups, channels_last, eps, add_first, activation, alpha, beta = norm
    samples, channels, *positions = x.shape
    plane = math.prod(positions)
    out = allocate(x, residual, norm, save_statistics, save_bits)
    if x.numel() == 0:
        return out
    x, x_stride = sample_view(x, channels_last)
    residual, residual_stride = (None, 0) if residual is None else sample_view(residual, channels_last)
    given = (x, residual, columns(weight), columns(bias))
    dtypes = [None if tensor is None else tensor.dtype for tensor in given]
    itemsize = x.element_size()
    vec = widest_access(itemsize, channels, plane, channels_last, x_stride, residual_stride)
    dense_vec = widest_access(itemsize, channels, plane, channels_last, channels * plane)
    kind = (channels, groups, plane_kind(plane), channels_last, vec, dense_vec)
    schedule = _schedule(*kind, add_first, activation, save_bits, save_statistics, *dtypes)
    schedule(samples, plane, given, out, (x_stride // vec, residual_stride // vec), (eps, alpha, beta))
    return out


def allocate(x: Tensor, residual: Tensor | None, norm: GroupNorm, save_statistics: bool, save_bits: bool) -> Forward:
    """What `group_norm_forward` returns, nothing in it yet."""
    samples, channels, *positions = x.shape
    plane = math.prod(positions)
    y = empty_samples(x, norm.channels_last)
    total = mean = rstd = bits = None
    if norm.add_first:
        total = empty_samples(x, norm.channels_last, residual.dtype)  # type: ignore[union-attr]
    if save_statistics:
        mean = torch.empty(samples * norm.groups, dtype=compute_dtype(x.dtype), device=x.device)
        rstd = torch.empty_like(mean)
    if save_bits:
        rows, run = (samples * plane, channels) if norm.channels_last else (samples * channels, plane)
        bits = torch.empty((rows, cdiv(run, 8)), dtype=torch.uint8, device=x.device)
    return Forward(y, total, mean, rstd, bits)


# --- schedules, one for each kind of call --------------------------------------------------------------------------


class _Kind(NamedTuple):
    """What the calls that one schedule serves have in common; the last four are types, None without the tensor.

    dense_vec: elements of the widest access where samples follow one another without gaps.
    """

    channels: int
    groups: int
    plane: PlaneKind
    channels_last: bool
    vec: int
    dense_vec: int
    add_first: bool
    activation: str | None
    save_bits: bool
    save_statistics: bool
    x: torch.dtype
    residual: torch.dtype | None
    weight: torch.dtype | None
    bias: torch.dtype | None

    @property
    def group_planes(self) -> GroupPlanes:
        """The groups, as their tile depends on them."""
        return group_planes(self.channels, self.groups, self.plane, self.x.itemsize)

    @property
    def functions(self) -> tuple[Any, Any]:
        """The activation's value, and which of its slope's two values an element has."""
        functions = ACTIVATIONS[self.activation]
        return functions.value, functions.passes if self.save_bits else None


@functools.cache
def _schedule(*fields: Any) -> Schedule:
    kind = _Kind(*fields)
    tile = None
    if not kind.channels_last:
        waiting = 2 if kind.residual is not None and not kind.add_first else 1
        tile = group_forward_tile(kind.group_planes, kind.x.itemsize, waiting, kind.add_first)
    if tile is None:
        return _Pieces(kind)
    block_groups = tile.block_groups
    constants = (kind.channels, kind.groups, kind.plane[0], kind.vec, *kind.functions)
    block = (block_groups, tile.block_planes, tile.block_plane, tile.run)
    launch = Launcher(
        channel_norm_forward_kernel, tile.num_warps, *constants, *block, most_registers=tile.most_registers
    )

    def whole_groups(
        samples: int, plane: int, given: Tensors, out: Forward, strides: tuple[int, int], floats: Floats
    ) -> None:
        y, total, mean, rstd, bits = out
        groups = samples * kind.groups
        launch(
            cdiv(groups, block_groups), y.device, given, (y, total, bits, mean, rstd),
            groups, *strides, plane_units(plane, kind.vec, False), *floats,
        )  # fmt: skip

    return whole_groups


class _Pieces:
    """Moments of each piece of each plane, those of a group merged, then the pieces again."""

    def __init__(self, kind: _Kind) -> None:
        self.kind = kind
        length, _ = kind.plane
        self.tile = tile = piece_tile(kind.channels, longest_of(kind.plane), kind.x.itemsize, kind.channels_last)
        block = (tile.block_channels, tile.block_plane, tile.stages)
        self.blocks = cdiv(kind.channels, tile.block_channels)

        def launcher(kernel: Any, *constants: Any) -> Launcher:
            return Launcher(kernel, tile.num_warps, *constants, most_registers=tile.most_registers)

        of_plane = (kind.channels, kind.groups, length, kind.vec, kind.channels_last)
        self.moments = launcher(channel_moments_kernel, kind.channels, length, kind.vec, kind.channels_last, *block)
        self.combine = Launcher(combine_moments_kernel, 4, *of_plane, tile.block_plane, COMBINED)
        # The total that it reads has no gaps.
        self.apply_vec = kind.dense_vec if kind.add_first else kind.vec
        self.apply = launcher(
            channel_apply_kernel, kind.channels, kind.groups, length, self.apply_vec, kind.channels_last,
            *kind.functions, *block,
        )  # fmt: skip

    def __call__(
        self, samples: int, plane: int, given: Tensors, out: Forward, strides: tuple[int, int], floats: Floats
    ) -> None:
        kind = self.kind
        x, residual, weight, bias = given
        y, total, mean, rstd, bits = out
        eps, *of_activation = floats
        device = y.device
        steps = forward_steps(plane, kind.x.itemsize, self.tile)
        pieces = cdiv(plane, self.tile.block_plane * steps)
        units = plane_units(plane, kind.vec, kind.channels_last)
        programs = samples * self.blocks * pieces
        means = torch.empty((samples, pieces, kind.channels), dtype=compute_dtype(y.dtype), device=device)
        origins, m2s = torch.empty_like(means), torch.empty_like(means)
        if mean is None:
            mean = torch.empty(samples * kind.groups, dtype=means.dtype, device=device)
            rstd = torch.empty_like(mean)
        added = residual if kind.add_first else None
        moments = (origins, means, m2s)
        self.moments(programs, device, (x, added), (total, *moments), *strides, units, pieces, steps)
        self.combine(samples * kind.groups, device, (), (*moments, mean, rstd), units, pieces, steps, eps)
        if kind.add_first:
            x, residual, strides = total, None, (kind.channels * plane // self.apply_vec, 0)
            units = plane_units(plane, self.apply_vec, kind.channels_last)
        self.apply(
            programs, device, (x, residual, weight, bias), (y, bits, mean, rstd),
            *strides, units, pieces, steps, *of_activation,
        )  # fmt: skip
