"""Launches the forward of batch norm: once where channels fit on chip or statistics are given, otherwise three times,
over pieces of the planes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..activations import ACTIVATIONS
from ..dropout import drop_numbers
from ..launch import cdiv
from ..launcher import Launcher, Tensors
from ..problem import BatchNorm, Forward, Tensor, compute_dtype
from ..views import Pooled, PooledPlanes, columns, empty_samples, plan_reading, pooled_planes
from .batch_kernels import batch_norm_forward_kernel
from .config import ChannelTile, batch_forward_tile, pooled_plane_kind, widest_access
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
    run = plan_forward(x, residual, weight, bias, norm, save_statistics, save_bits, running_mean, running_var)
    return run(norm.seed, x, residual, weight, bias, running_mean, running_var, norm.momentum)


def plan_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: BatchNorm,
    save_statistics: bool,
    save_bits: bool,
    *running: Tensor | None,
) -> Callable[..., Forward]:
    """`batch_norm_forward` of all tensors that lie as these do: a function of the seed, of them and of the momentum."""
    if x.numel() == 0:
        return lambda seed, x, residual, *_: allocate(x, residual, norm, save_statistics, save_bits)
    kind, view, read, strides = prepare(x, residual, weight, bias, norm, running, save_statistics, save_bits)
    floats = numbers_of(norm, x)
    tile = None
    if norm.training and view.channels_last:
        spread = view.channels // kind.groups
        smooth = ACTIVATIONS[norm.activation].slope is not None
        added, drops = norm.add_first, norm.seed is not None
        tile = batch_forward_tile(view.plane, spread, x.element_size(), kind.waiting, added, smooth, drops)
    norm = norm._replace(seed=None)  # that of each call is its own
    training = norm.training

    if tile is not None:
        launch, programs = _whole_channels(kind, tile), cdiv(kind.groups, tile.block_channels)

        def compute(given: Tensors, out: Forward, moved: Running, momentum: float) -> None:
            y, total, mean, rstd, bits = out
            launch(programs, y.device, (*given, *moved), (y, total, bits, mean, rstd), view.plane, momentum, *floats)

    else:
        pieces = pieces_of(kind)

        def compute(given: Tensors, out: Forward, moved: Running, momentum: float) -> None:
            call = (view.samples, view.plane, given, out, strides, floats, moved)
            if training:
                pieces(*call, momentum)
            else:
                pieces.by_running_statistics(*call)

    def run(
        seed: Tensor | None,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        momentum: float = 0.0,
    ) -> Forward:
        out = allocate(x, residual, norm, save_statistics, save_bits)
        moved = (columns(running_mean), columns(running_var))
        compute(read((x, residual, weight, bias, seed)), out, moved, momentum)
        if training:
            store_moved((running_mean, running_var), moved)
        return out

    return run


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
    """Calls as kernels take them: what reads x, residual, weight, bias and the seed; strides in units of kind.vec."""

    kind: ForwardKind
    view: PooledPlanes
    read: Callable[[Tensors], Tensors]
    strides: tuple[int, int]


def prepare(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: BatchNorm,
    running: tuple[Tensor | None, ...],
    save_statistics: bool,
    save_bits: bool,
) -> Prepared:
    """Calls of `batch_norm_forward` on tensors that lie as these do, of which there are elements."""
    view = pooled_planes(x.shape, norm.channels_last)
    tensors = (x, residual, weight, bias, norm.seed)
    strides, read = plan_reading(Pooled(norm.channels_last, view), tensors, activations=2)
    dtypes: list[Any] = [None if tensor is None else tensor.dtype for tensor in (*tensors, *(running or (None, None)))]
    vec, dense_vec = (
        widest_access(x.element_size(), *view[1:], *of_runs) for of_runs in (strides, (view.channels * view.plane,))
    )
    kind = ForwardKind(
        view.channels, x.shape[1], pooled_plane_kind(view), view.channels_last, True, vec, dense_vec,
        norm.add_first, norm.activation, save_bits, save_statistics, *dtypes,
    )  # fmt: skip
    return Prepared(kind, view, read, (strides[0] // vec, strides[1] // vec))


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
    constants = (kind.channels, kind.groups, *kind.functions, *tile.block)
    return Launcher(batch_norm_forward_kernel, tile.num_warps, *constants, may_halve=True)
