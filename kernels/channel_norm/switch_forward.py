"""Launches the forward of switchable norm: moments of the planes, what is merged of them, and the planes again."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from ..dropout import drop_numbers
from ..launch import cdiv
from ..launcher import Launcher
from ..problem import Forward, GroupNorm, Kinds, Mixture, SwitchNorm, Tensor, compute_dtype
from ..views import Samples, columns, plan_reading
from .batch_forward import store_moved
from .config import Merged, merge_tile, pieces_of_forward, plane_kind, widest_access
from .forward import allocate as allocate_of_planes
from .forward_pieces import ForwardKind, ForwardPieces
from .switch_kernels import combine_switch_moments_kernel


def switch_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mixture: Mixture,
    norm: SwitchNorm,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    save_statistics: bool = False,
    save_bits: bool = False,
) -> tuple[Forward, Kinds | None]:
    """y and what else is asked for, in three launches; mean and rstd, [samples * channels], are those of the mixture,
    beside what was mixed. Arguments as of `batch_norm_forward`; None without elements."""
    channels_last, training, momentum, eps, add_first, activation, alpha, beta, dropout_p, seed = norm
    samples, channels, *positions = x.shape
    plane = math.prod(positions)
    out = allocate(x, residual, norm, save_statistics, save_bits)
    if x.numel() == 0:
        return out, None
    tensors = (x, residual, weight, bias, seed)
    strides, read = plan_reading(Samples(channels_last), tensors, activations=2)
    given = read(tensors)
    floats = (*drop_numbers(seed, dropout_p, plane), eps, alpha, beta)
    running = (columns(running_mean), columns(running_var))
    weights = (columns(mixture.mean_weight), columns(mixture.var_weight))
    dtypes: list[Any] = [None if tensor is None else tensor.dtype for tensor in (*given, *running)]
    dtypes += [mixture.kinds, mixture.mean_weight.dtype, mixture.var_weight.dtype]
    vec, dense_vec = (
        widest_access(x.element_size(), channels, plane, channels_last, *of_runs)
        for of_runs in (strides, (channels * plane,))
    )
    kind = ForwardKind(
        channels, channels, plane_kind(plane), channels_last, False, vec, dense_vec,
        add_first, activation, save_bits, save_statistics, *dtypes,
    )  # fmt: skip
    units = (strides[0] // vec, strides[1] // vec)
    pieces, merge = _pieces(kind), _merge(kind, training)
    moments, *lengths = pieces.reduce(samples, plane, given, out.total, units, floats)
    means = torch.empty(samples * channels + samples + channels, dtype=compute_dtype(x.dtype), device=x.device)
    kinds = Kinds(means, torch.empty_like(means))
    programs = merging_programs(samples, channels, _merge_tile(kind))
    merge(programs, x.device, running, (*moments, *kinds), samples, *lengths, momentum)
    if training:
        store_moved((running_mean, running_var), running)
    pieces.finish(samples, plane, given, out, units, floats, (*kinds, *weights))
    return out, kinds


def allocate(x: Tensor, residual: Tensor | None, norm: SwitchNorm, save_statistics: bool, save_bits: bool) -> Forward:
    """The first of what `switch_norm_forward` returns, nothing in it yet."""
    of_planes = GroupNorm(x.shape[1] or 1, norm.channels_last, norm.eps, norm.add_first)
    return allocate_of_planes(x, residual, of_planes, save_statistics, save_bits)


def merging_programs(samples: int, channels: int, tile: Merged) -> int:
    """Programs that merge partial results: one a sample, and of blocks of planes and of channels."""
    return cdiv(samples * channels, tile.planes) + samples + cdiv(channels, tile.channels)


@functools.cache
def _pieces(kind: ForwardKind) -> ForwardPieces:
    return ForwardPieces(kind)


@functools.cache
def _merge_tile(kind: ForwardKind) -> Merged:
    return merge_tile(pieces_of_forward(kind.plane, kind.x.itemsize, _pieces(kind).tile))


@functools.cache
def _merge(kind: ForwardKind, training: bool) -> Launcher:
    of_plane = (kind.channels, kind.plane[0], kind.vec, kind.channels_last)
    constants = (*of_plane, _pieces(kind).tile.block_plane, not training, *_merge_tile(kind))
    return Launcher(combine_switch_moments_kernel, 4, *constants)
