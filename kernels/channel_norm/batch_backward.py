"""Launches the backward of batch norm: once where channels fit on chip, otherwise three times, over pieces of the
planes, or twice where statistics are given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..launch import cdiv
from ..launcher import Launcher, Tensors
from ..problem import BatchNorm, Gradients, Tensor, Wanted, without_elements
from ..views import Pooled, PooledPlanes, pooled_planes
from .backward import allocate_gradients, plan_operands
from .backward_pieces import BackwardKind, BackwardPieces, Pair, Strides
from .batch_forward import batch_drop_numbers
from .batch_kernels import batch_norm_backward_kernel
from .config import ChannelTile, batch_backward_tile, pooled_plane_kind


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
    tensors = (dy, dtotal, x, residual, bits, weight, bias, mean, rstd)
    return plan_backward(*tensors, norm, wanted)(norm.seed, *tensors)


def plan_backward(
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
) -> Callable[..., Gradients]:
    """`batch_norm_backward` of all tensors that lie as these do: a function of the seed and of them."""
    if dy.numel() == 0:
        return without_elements(allocate_gradients, norm, wanted)
    tensors = (dy, dtotal, x, residual, bits, weight, bias, mean, rstd, norm.seed)
    kind, view, read, strides = prepare_backward(tensors, norm, wanted)
    floats = (*batch_drop_numbers(norm, dy), norm.alpha, norm.beta)
    tile = None
    if norm.training and view.channels_last:
        spread, is_read = view.channels // kind.groups, kind.residual is not None
        tile = batch_backward_tile(view.plane, spread, dy.element_size(), kind.crowded, is_read)
    norm = norm._replace(seed=None)  # that of each call is its own

    if tile is not None:
        launch, programs = _whole_channels(kind, tile), cdiv(kind.groups, tile.block_channels)

        def compute(given: Tensors, out: Pair) -> Pair:
            device = given[0].device  # type: ignore[union-attr]
            dweight = torch.empty(kind.groups, dtype=kind.weight, device=device) if wanted.dweight else None
            dbias = torch.empty(kind.groups, dtype=kind.dbias, device=device) if wanted.dbias else None
            launch(programs, device, given, (*out, dweight, dbias), view.plane, *floats)
            return dweight, dbias

    else:
        pieces = backward_pieces_of(kind)

        def compute(given: Tensors, out: Pair) -> Pair:
            return pieces(view.samples, view.plane, given, out, strides, floats)

    def run(seed: Tensor | None, dy: Tensor, dtotal: Tensor | None, x: Tensor | None, *others: Any) -> Gradients:
        out = allocate_gradients(dy, x, norm, wanted)
        return Gradients(*out, *compute(read((dy, dtotal, x, *others, seed)), out))

    return run


class PreparedBackward(NamedTuple):
    """Calls as kernels take them: what reads dy and what follows it; strides in units of kind.vec."""

    kind: BackwardKind
    view: PooledPlanes
    read: Callable[[Tensors], Tensors]
    strides: Strides


def prepare_backward(tensors: Tensors, norm: BatchNorm, wanted: Wanted) -> PreparedBackward:
    """Calls of `batch_norm_backward` on tensors that lie as these do, dy with elements first and the seed last."""
    dy, bits = tensors[0], tensors[4]
    assert dy is not None
    view = pooled_planes(dy.shape, norm.channels_last)
    computes_z = norm.activation is not None and bits is None
    reads_x = computes_z or wanted.dweight or (norm.training and (wanted.dx or wanted.dresidual))
    read, strides, vec, dtypes = plan_operands(
        tensors, norm, wanted, view[1:], Pooled(norm.channels_last, view), reads_x
    )
    kind = BackwardKind(
        view.channels, dy.shape[1], pooled_plane_kind(view), view.channels_last, True, not norm.training,
        vec, norm.add_first, norm.activation, wanted, *dtypes,
    )  # fmt: skip
    return PreparedBackward(kind, view, read, strides)


@functools.cache
def backward_pieces_of(kind: BackwardKind) -> BackwardPieces:
    """The schedule over pieces, for calls of this kind."""
    return BackwardPieces(kind)


@functools.cache
def _whole_channels(kind: BackwardKind, tile: ChannelTile) -> Launcher:
    constants = (kind.channels, kind.groups, kind.add_first, kind.needs_dx, *kind.slope, *tile.block)
    return Launcher(batch_norm_backward_kernel, tile.num_warps, *constants)
