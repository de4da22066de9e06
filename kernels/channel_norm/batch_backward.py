"""Launches the backward of batch norm: once where channels fit on chip, otherwise three times, over pieces of the
planes, or twice where statistics are given.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..launch import cdiv
from ..launcher import Launcher, Tensors
from ..problem import BatchNorm, Gradients, Tensor, Wanted, parameter_zeros
from ..views import PooledPlanes, pooled_planes, pooled_view
from .backward import allocate_gradients, operands
from .backward_pieces import BackwardKind, BackwardPieces, Strides
from .batch_forward import batch_drop_numbers
from .batch_kernels import batch_norm_backward_kernel
from .config import ChannelTile, batch_backward_tile, pooled_plane_kind, with_dropout


def batch_norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor | None,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    norm: BatchNorm,
    wanted: Wanted,
) -> Gradients:
    """The wanted gradients, as of `group_norm_backward`. Not norm.training, mean and rstd are no functions of x."""
    dx, dresidual = allocate_gradients(dy, x, norm, wanted)
    if dy.numel() == 0:
        return Gradients(dx, dresidual, *parameter_zeros(weight, bias, wanted))

    saved = (x, residual, bits, weight, bias, mean, rstd)
    kind, view, given, strides = prepare_backward(dy, dtotal, saved, norm, wanted)
    floats = (*batch_drop_numbers(norm, dy), norm.alpha, norm.beta)
    tile = None
    if norm.training and view.channels_last:
        is_read = kind.residual is not None
        tile = batch_backward_tile(view.plane, view.channels // kind.groups, dy.element_size(), is_read)
    if tile is None:
        found = backward_pieces_of(kind)(view.samples, view.plane, given, (dx, dresidual), strides, floats)
        return Gradients(dx, dresidual, *found)
    dweight = torch.empty(kind.groups, dtype=kind.weight, device=dy.device) if wanted.dweight else None
    dbias = torch.empty(kind.groups, dtype=kind.dbias, device=dy.device) if wanted.dbias else None
    launch, programs = _whole_channels(kind, tile), cdiv(kind.groups, tile.block_channels)
    launch(programs, dy.device, given, (dx, dresidual, dweight, dbias), view.plane, *floats)
    return Gradients(dx, dresidual, dweight, dbias)


class PreparedBackward(NamedTuple):
    """A call as kernels take it: tensors that they can read, dy first, strides in units of kind.vec."""

    kind: BackwardKind
    view: PooledPlanes
    given: Tensors
    strides: Strides


def prepare_backward(
    dy: Tensor, dtotal: Tensor | None, saved: Tensors, norm: BatchNorm, wanted: Wanted
) -> PreparedBackward:
    """What `batch_norm_backward` was given, of which there are elements; `saved` are x and what follows it there."""
    x, residual, bits, weight, bias, mean, rstd = saved
    view = pooled_planes(dy.shape, norm.channels_last)
    computes_z = norm.activation is not None and bits is None
    if not (computes_z or wanted.dweight or (norm.training and (wanted.dx or wanted.dresidual))):
        x = None
    given, strides, vec, dtypes = operands(
        dy, dtotal, (x, residual, bits, weight, bias, mean, rstd), norm, wanted,
        view[1:], lambda tensor: pooled_view(tensor, norm.channels_last, view),
    )  # fmt: skip
    kind = BackwardKind(
        view.channels, dy.shape[1], pooled_plane_kind(view), view.channels_last, True, not norm.training,
        vec, norm.add_first, norm.activation, wanted, *dtypes,
    )  # fmt: skip
    return PreparedBackward(kind, view, given, strides)


@functools.cache
def backward_pieces_of(kind: BackwardKind) -> BackwardPieces:
    """The schedule over pieces, for calls of this kind."""
    return BackwardPieces(kind)


@functools.cache
def _whole_channels(kind: BackwardKind, tile: ChannelTile) -> Launcher:
    if kind.seed is not None:
        tile = with_dropout(tile)
    constants = (kind.channels, kind.groups, kind.add_first, kind.needs_dx, *kind.slope)
    block = (tile.block_channels, tile.block_rows, tile.block_columns)
    return Launcher(batch_norm_backward_kernel, tile.num_warps, *constants, *block, most_registers=tile.most_registers)
