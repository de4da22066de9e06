"""Launches the backward of batch norm: once where channels fit on chip, otherwise three times, over pieces of the
planes, or twice where statistics are given.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..launch import cdiv
from ..launcher import Launcher
from ..problem import BatchNorm, Gradients, Tensor, Wanted, parameter_zeros
from ..views import columns, pooled_planes, pooled_view
from .backward import allocate_gradients
from .backward_pieces import BackwardKind, BackwardPieces
from .batch_kernels import batch_norm_backward_kernel
from .config import ChannelTile, batch_backward_tile, pooled_plane_kind, widest_access


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
    channels_last, training, _, _, add_first, activation, alpha, beta = norm
    dx, dresidual = allocate_gradients(dy, x, norm, wanted)
    if dy.numel() == 0:
        return Gradients(dx, dresidual, *parameter_zeros(weight, bias, wanted))

    view = pooled_planes(dy.shape, channels_last)
    if activation is None or bits is not None:  # z is not computed again
        residual = bias_read = None
        if not (wanted.dweight or (training and (wanted.dx or wanted.dresidual))):
            x = None
    else:
        bias_read = columns(bias)
    strides = [0, 0, 0, 0]
    needs_dx = wanted.dx or (add_first and wanted.dresidual)
    activations = [dy, dtotal if needs_dx else None, x, residual]
    for index, tensor in enumerate(activations):
        if tensor is not None:
            activations[index], strides[index] = pooled_view(tensor, channels_last, view)
    vec = widest_access(dy.element_size(), *view[1:], *strides)
    # What was saved may come back in another layout, from whoever packed it.
    given = (*activations, columns(bits), columns(weight), bias_read, columns(mean), columns(rstd))
    dtypes: list[Any] = [
        None if tensor is None else tensor.dtype for tensor in (*given, bias)
    ]  # read or not, dbias's type
    groups = dy.shape[1]
    kind = BackwardKind(
        view.channels, groups, pooled_plane_kind(view), view.channels_last, True, not training,
        vec, add_first, activation, wanted, *dtypes,
    )  # fmt: skip
    tile = None
    if training and view.channels_last:
        tile = batch_backward_tile(view.plane, view.channels // groups, dy.element_size(), residual is not None)
    if tile is None:
        units = [stride // vec for stride in strides]
        found = _pieces(kind)(view.samples, view.plane, given, (dx, dresidual), units, (alpha, beta))
        return Gradients(dx, dresidual, *found)
    dweight = torch.empty(groups, dtype=kind.weight, device=dy.device) if wanted.dweight else None
    dbias = torch.empty(groups, dtype=kind.dbias, device=dy.device) if wanted.dbias else None
    launch, programs = _whole_channels(kind, tile), cdiv(groups, tile.block_channels)
    launch(programs, dy.device, given, (dx, dresidual, dweight, dbias), view.plane, alpha, beta)
    return Gradients(dx, dresidual, dweight, dbias)


@functools.cache
def _pieces(kind: BackwardKind) -> BackwardPieces:
    return BackwardPieces(kind)


@functools.cache
def _whole_channels(kind: BackwardKind, tile: ChannelTile) -> Launcher:
    constants = (kind.channels, kind.groups, kind.add_first, kind.needs_dx, *kind.slope)
    block = (tile.block_channels, tile.block_rows, tile.block_columns)
    return Launcher(batch_norm_backward_kernel, tile.num_warps, *constants, *block, most_registers=tile.most_registers)
