"""Launches the backward of switchable norm: sums over planes, what is merged of them, the planes again."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from ..dropout import drop_numbers
from ..launcher import Launcher
from ..problem import Gradients, Kinds, Mixture, SwitchNorm, Tensor, Wanted, compute_dtype
from ..views import Samples, columns
from .backward import allocate_gradients, plan_operands
from .backward_pieces import BackwardKind, BackwardPieces
from .config import Merged, merge_tile, pieces_of_backward, plane_kind
from .switch_forward import merging_programs
from .switch_kernels import combine_switch_gradients_kernel, mixing_gradients_kernel


class MixtureGradients(NamedTuple):
    """Of the weights of a mixture; None where not wanted."""

    dmean_weight: Tensor | None
    dvar_weight: Tensor | None


def switch_norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mixture: Mixture,
    kinds: Kinds,
    norm: SwitchNorm,
    wanted: Wanted,
    wanted_of_mixture: tuple[bool, bool],
) -> tuple[Gradients, MixtureGradients]:
    """The wanted gradients, in three launches, of a call with elements. Not norm.training, the statistics of channels
    are no functions of x."""
    channels_last, training, _, _, add_first, activation, alpha, beta, dropout_p, seed = norm
    samples, channels, *positions = dy.shape
    plane, device = math.prod(positions), dy.device
    dx, dresidual = allocate_gradients(dy, x, norm, wanted)
    tensors = (dy, dtotal, x, residual, bits, weight, bias, mean, rstd, seed)
    sizes = (channels, plane, channels_last)
    read, units, vec, dtypes = plan_operands(tensors, norm, wanted, sizes, Samples(channels_last))
    given = read(tensors)
    dtypes += [mixture.kinds, mixture.mean_weight.dtype, mixture.var_weight.dtype, *wanted_of_mixture]
    kind = BackwardKind(
        channels, channels, plane_kind(plane), channels_last, False, False, vec, add_first, activation, wanted, *dtypes,
    )  # fmt: skip
    pieces = _pieces(kind)
    lengths = pieces.lengths(samples, plane, device)
    of_dz_x_hat, of_dz = sums = kind.partials((samples, lengths[1], channels), device, both=True)
    floats = (*drop_numbers(seed, dropout_p, plane), alpha, beta)
    pieces.reduce(samples, given, (dx, dresidual), sums, units, lengths, floats)

    wide, most = compute_dtype(dy.dtype), kinds.means.numel()
    mean_g = torch.empty(most, dtype=wide, device=device) if kind.needs_dx else None
    mean_g_x_hat = torch.empty(most, dtype=wide, device=device) if kind.needs_dx else None
    dweight = torch.empty(channels, dtype=kind.weight, device=device) if wanted.dweight else None
    dbias = torch.empty(channels, dtype=kind.dbias, device=device) if wanted.dbias else None
    products = torch.empty((samples, 6), dtype=wide, device=device) if any(wanted_of_mixture) else None
    _merge(kind, training)(
        merging_programs(samples, channels, _merge_tile(kind)), device, (given[5], given[8], *map(columns, kinds)),
        (of_dz, of_dz_x_hat, mean_g, mean_g_x_hat, dweight, dbias, products), samples, *lengths[:2],
    )  # fmt: skip
    weights = (columns(mixture.mean_weight), columns(mixture.var_weight))
    of_mixture = MixtureGradients(
        *(torch.empty_like(of) if is_wanted else None for of, is_wanted in zip(mixture, wanted_of_mixture, strict=True))
    )
    if kind.needs_dx:
        means = (columns(kinds.means), *weights, products, mean_g, mean_g_x_hat)
        pieces.finish(samples, plane, given, (dx, dresidual), means, units, lengths, floats, (*of_mixture,))
    elif products is not None:
        _mixing(kind)(1, device, weights, (products, *of_mixture), samples)
    return Gradients(dx, dresidual, dweight, dbias), of_mixture


@functools.cache
def _pieces(kind: BackwardKind) -> BackwardPieces:
    return BackwardPieces(kind)


@functools.cache
def _merge_tile(kind: BackwardKind) -> Merged:
    return merge_tile(pieces_of_backward(kind.plane, kind.dy.itemsize, _pieces(kind).tile))


@functools.cache
def _merge(kind: BackwardKind, training: bool) -> Launcher:
    constants = (kind.channels, kind.plane[0], kind.vec, kind.channels_last, not training, *_merge_tile(kind))
    return Launcher(combine_switch_gradients_kernel, 4, *constants)


@functools.cache
def _mixing(kind: BackwardKind) -> Launcher:
    return Launcher(mixing_gradients_kernel, 1, kind.kinds)
