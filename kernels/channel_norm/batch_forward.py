"""Launches the forward of batch norm: once where channels fit on chip or statistics are given, otherwise three times,
over pieces of the planes.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from ..dropout import drop_numbers
from ..launch import cdiv
from ..launcher import Launcher, Tensors
from ..problem import BatchNorm, Forward, Tensor, compute_dtype
from ..views import PooledPlanes, columns, empty_samples, pooled_planes, pooled_view
from .batch_kernels import batch_norm_forward_kernel
from .config import ChannelTile, batch_forward_tile, pooled_plane_kind, widest_access, with_dropout
from .forward_pieces import Floats, ForwardKind, ForwardPieces, Running


def batch_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: BatchNorm,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    save_statistics: bool = False,
    save_bits: bool = False,
) -> Forward:
    """y and what else is asked for. norm.training, running statistics, if any, are changed in place.

    x is [samples, channels, *positions]; x or a residual is copied where its samples have gaps or another layout than
    the norm's. weight, bias and the running statistics have an element a channel. With save_bits, a bit says that the
    activation's slope is 1.
    """
    out = allocate(x, residual, norm, save_statistics, save_bits)
    if x.numel() == 0:
        return out
    running = (columns(running_mean), columns(running_var))
    kind, view, given, strides = prepare(x, residual, weight, bias, norm, running, save_statistics, save_bits)
    floats = numbers_of(norm, x)
    tile = None
    if norm.training and view.channels_last:
        waiting = 2 if residual is not None and not norm.add_first else 1
        tile = batch_forward_tile(view.plane, view.channels // kind.groups, x.element_size(), waiting)
    if tile is not None:
        launch = _whole_channels(kind, tile)
        y, total, mean, rstd, bits = out
        launch(
            cdiv(kind.groups, tile.block_channels), y.device, (*given, *running), (y, total, bits, mean, rstd),
            view.plane, norm.momentum, *floats,
        )  # fmt: skip
        store_moved((running_mean, running_var), running)
        return out
    call = (view.samples, view.plane, given, out, strides, floats)
    if not norm.training:
        pieces_of(kind).by_running_statistics(*call, running)
        return out
    pieces_of(kind)(*call, running, norm.momentum)
    store_moved((running_mean, running_var), running)
    return out


def numbers_of(norm: BatchNorm, x: Tensor) -> Floats:
    """The run-time numbers of the kernels that read x."""
    return (*batch_drop_numbers(norm, x), norm.eps, norm.alpha, norm.beta)


def batch_drop_numbers(norm: BatchNorm, x: Tensor) -> tuple[int, int, float]:
    """`drop_numbers` of a tensor as its `pooled_planes`, of which one goes through several samples."""
    positions = math.prod(x.shape[2:])
    if not norm.channels_last and pooled_planes(x.shape, False).channels_last:
        positions = 1  # a sample is a row there, and its positions are columns
    return drop_numbers(norm.seed, norm.dropout_p, positions)


class Prepared(NamedTuple):
    """A call as kernels take it: x, residual, weight and bias that they can read, the seed; strides in units of
    kind.vec."""

    kind: ForwardKind
    view: PooledPlanes
    given: Tensors
    strides: tuple[int, int]


def prepare(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: BatchNorm,
    running: Running,
    save_statistics: bool,
    save_bits: bool,
) -> Prepared:
    """What `batch_norm_forward` was given, of which there are elements."""
    view = pooled_planes(x.shape, norm.channels_last)
    groups = x.shape[1]
    x, x_stride = pooled_view(x, norm.channels_last, view)
    residual, residual_stride = (None, 0) if residual is None else pooled_view(residual, norm.channels_last, view)
    given = (x, residual, columns(weight), columns(bias), norm.seed)
    dtypes: list[Any] = [None if tensor is None else tensor.dtype for tensor in (*given, *running)]
    vec, dense_vec = (
        widest_access(x.element_size(), *view[1:], *strides)
        for strides in ((x_stride, residual_stride), (view.channels * view.plane,))
    )
    kind = ForwardKind(
        view.channels, groups, pooled_plane_kind(view), view.channels_last, True, vec, dense_vec,
        norm.add_first, norm.activation, save_bits, save_statistics, *dtypes,
    )  # fmt: skip
    return Prepared(kind, view, given, (x_stride // vec, residual_stride // vec))


def store_moved(statistics: Running, moved: Running) -> None:
    """Stores a running statistic that was moved as a copy, because its elements are no contiguous run."""
    for statistic, copy in zip(statistics, moved, strict=True):
        if statistic is not None and copy is not None and copy is not statistic:
            statistic.copy_(copy)


def allocate(x: Tensor, residual: Tensor | None, norm: BatchNorm, save_statistics: bool, save_bits: bool) -> Forward:
    """What `batch_norm_forward` returns, nothing in it yet."""
    y = empty_samples(x, norm.channels_last)
    total = mean = rstd = bits = None
    if norm.add_first:
        total = empty_samples(x, norm.channels_last, residual.dtype)  # type: ignore[union-attr]
    if save_statistics:
        mean = torch.empty(x.shape[1], dtype=compute_dtype(x.dtype), device=x.device)
        rstd = torch.empty_like(mean)
    if save_bits:
        runs, length = pooled_planes(x.shape, norm.channels_last).runs
        bits = torch.empty((runs, cdiv(length, 8)), dtype=torch.uint8, device=x.device)
    return Forward(y, total, mean, rstd, bits)


@functools.cache
def pieces_of(kind: ForwardKind) -> ForwardPieces:
    """The schedule over pieces, for calls of this kind."""
    return ForwardPieces(kind)


@functools.cache
def _whole_channels(kind: ForwardKind, tile: ChannelTile) -> Launcher:
    if kind.seed is not None:
        tile = with_dropout(tile)
    constants = (kind.channels, kind.groups, *kind.functions)
    block = (tile.block_channels, tile.block_rows, tile.block_columns)
    return Launcher(batch_norm_forward_kernel, tile.num_warps, *constants, *block, most_registers=tile.most_registers)
