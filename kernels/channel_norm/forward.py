"""Launches the forward of the channel family: whole groups in one launch, others in pieces, in three."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from ..dropout import drop_numbers
from ..launch import cdiv
from ..launcher import Launcher, Tensors
from ..problem import Forward, GroupNorm, Tensor, compute_dtype
from ..views import Samples, empty_samples, plan_reading
from .config import group_forward_tile, plane_kind, plane_units, widest_access
from .forward_kernels import channel_norm_forward_kernel
from .forward_pieces import Floats, ForwardKind, ForwardPieces

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
    run = plan_forward(x, residual, weight, bias, norm, save_statistics, save_bits)
    return run(norm.seed, x, residual, weight, bias)


def plan_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: GroupNorm,
    save_statistics: bool,
    save_bits: bool,
) -> Callable[..., Forward]:
    """`group_norm_forward` of all tensors that lie as these do: a function of the seed and of them."""
    groups, channels_last, eps, add_first, activation, alpha, beta, dropout_p, seed = norm
    norm = norm._replace(seed=None)  # that of each call is its own
    if x.numel() == 0:
        return lambda seed, x, residual, *_: allocate(x, residual, norm, save_statistics, save_bits)
    samples, channels, *positions = x.shape
    plane = math.prod(positions)
    tensors = (x, residual, weight, bias, seed)
    strides, read = plan_reading(Samples(channels_last), tensors, activations=2)
    dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
    itemsize = x.element_size()
    vec = widest_access(itemsize, channels, plane, channels_last, *strides)
    dense_vec = widest_access(itemsize, channels, plane, channels_last, channels * plane)
    kind = (channels, groups, plane_kind(plane), channels_last, False, vec, dense_vec)
    schedule = _schedule(*kind, add_first, activation, save_bits, save_statistics, *dtypes)
    floats = (*drop_numbers(seed, dropout_p, plane), eps, alpha, beta)
    units = strides[0] // vec, strides[1] // vec

    def run(
        seed: Tensor | None, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Forward:
        out = allocate(x, residual, norm, save_statistics, save_bits)
        schedule(samples, plane, read((x, residual, weight, bias, seed)), out, units, floats)
        return out

    return run


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


@functools.cache
def _schedule(*fields: Any) -> Schedule:
    kind = ForwardKind(*fields)
    tile = None
    if not kind.channels_last:
        drops = kind.seed is not None
        tile = group_forward_tile(kind.group_planes, kind.x.itemsize, kind.waiting, drops)
    if tile is None:
        return ForwardPieces(kind)
    block_groups = tile.block_groups
    constants = (kind.channels, kind.groups, kind.plane[0], kind.vec, *kind.functions)
    launch = Launcher(channel_norm_forward_kernel, tile.num_warps, *constants, *tile.block(kind.plane, kind.vec))

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
