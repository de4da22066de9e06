"""Launches the backward of the channel family: whole groups in one launch and a sum of partials, pieces in three."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..activations import ACTIVATIONS
from ..column_sum import column_sum
from ..launch import cdiv, device_facts
from ..launcher import Launcher, Tensors
from ..problem import Gradients, GroupNorm, Tensor, Wanted, compute_dtype, parameter_zeros
from ..views import columns, empty_samples, sample_view
from .backward_kernels import (
    channel_gradient_apply_kernel,
    channel_gradient_sums_kernel,
    channel_norm_backward_kernel,
    combine_gradients_kernel,
)
from .config import (
    GroupPlanes,
    PlaneKind,
    backward_steps,
    group_backward_tile,
    group_planes,
    longest_of,
    piece_tile,
    plane_kind,
    plane_units,
    widest_access,
)
from .forward import COMBINED

COMBINED_COLUMNS = (256, 16)  # partial sums, rows and channels, that a program sums at a time
Strides = list[int]
Pair = tuple[Tensor | None, Tensor | None]
Schedule = Callable[[int, int, Tensors, Pair, Strides, tuple[float, float]], Pair]


def group_norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor | None,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    norm: GroupNorm,
    wanted: Wanted,
) -> Gradients:
    """The wanted gradients, in two launches, or three where groups are too large to hold or their elements lie apart.

    x is what was normalized (with norm.add_first the total), or None where nothing wanted depends on it. With
    norm.add_first, dx and dresidual are the same values: ask for both only where their types differ.
    """
    groups, channels_last, _, add_first, activation, alpha, beta = norm
    needs_dx = wanted.dx or (add_first and wanted.dresidual)
    samples, channels, *positions = dy.shape
    plane = math.prod(positions)
    dx, dresidual = allocate_gradients(dy, x, norm, wanted)
    if dy.numel() == 0:
        return Gradients(dx, dresidual, *parameter_zeros(weight, bias, wanted))

    if activation is None or bits is not None:  # z is not computed again
        residual = bias_read = None
    else:
        bias_read = columns(bias)
    strides = [0, 0, 0, 0]
    activations = [dy, dtotal if needs_dx else None, x, residual]
    for index, tensor in enumerate(activations):
        if tensor is not None:
            activations[index], strides[index] = sample_view(tensor, channels_last)
    vec = widest_access(dy.element_size(), channels, plane, channels_last, *strides)
    # What was saved may come back in another layout, from whoever packed it.
    given = (*activations, columns(bits), columns(weight), bias_read, columns(mean), columns(rstd))
    dtypes = [None if tensor is None else tensor.dtype for tensor in (*given, bias)]  # bias: read or not, dbias's type
    kind = (channels, groups, plane_kind(plane), channels_last, vec, add_first, activation, wanted)
    schedule = _schedule(*kind, *dtypes)
    units = [stride // vec for stride in strides]
    return Gradients(dx, dresidual, *schedule(samples, plane, given, (dx, dresidual), units, (alpha, beta)))


def allocate_gradients(dy: Tensor, x: Tensor | None, norm: GroupNorm, wanted: Wanted) -> Pair:
    """(dx, dresidual), each where wanted, nothing in them yet; x is what was normalized."""
    dtype = x.dtype if norm.add_first and x is not None else dy.dtype
    dx = empty_samples(dy, norm.channels_last) if wanted.dx else None
    return dx, empty_samples(dy, norm.channels_last, dtype) if wanted.dresidual else None


# --- schedules, one for each kind of call --------------------------------------------------------------------------


class _Kind(NamedTuple):
    """What the calls that one schedule serves have in common; from dy on types, None without the tensor."""

    channels: int
    groups: int
    plane: PlaneKind
    channels_last: bool
    vec: int
    add_first: bool
    activation: str | None
    wanted: Wanted
    dy: torch.dtype
    dtotal: torch.dtype | None
    x: torch.dtype | None
    residual: torch.dtype | None
    bits: torch.dtype | None
    weight: torch.dtype | None
    bias: torch.dtype | None
    mean: torch.dtype | None
    rstd: torch.dtype | None
    dbias: torch.dtype | None

    @property
    def group_planes(self) -> GroupPlanes:
        """The groups, as their tile depends on them."""
        return group_planes(self.channels, self.groups, self.plane, self.dy.itemsize)

    @property
    def needs_dx(self) -> bool:
        return self.wanted.dx or (self.add_first and self.wanted.dresidual)

    @property
    def slope(self) -> tuple[Any, Any]:
        """The activation's slope, or which of its two values an element has."""
        _, slope, passes = ACTIVATIONS[self.activation]
        return slope, passes

    def partials(self, shape: tuple[int, ...], device: torch.device, both: bool) -> Pair:
        """Uninitialized sums of dz * x_hat and of dz over planes, for dweight and dbias, or for dx as well."""
        dtype = compute_dtype(self.dy)
        of_dz_x_hat = torch.empty(shape, dtype=dtype, device=device) if both or self.wanted.dweight else None
        of_dz = torch.empty(shape, dtype=dtype, device=device) if both or self.wanted.dbias else None
        return of_dz_x_hat, of_dz


@functools.cache
def _schedule(*fields: Any) -> Schedule:
    kind = _Kind(*fields)
    tile = None
    if not kind.channels_last:
        tile = group_backward_tile(kind.group_planes, kind.dy.itemsize, kind.residual is not None)
    if tile is None:
        return _Pieces(kind)
    block_groups = tile.block_groups
    constants = (kind.channels, kind.groups, kind.plane[0], kind.vec, kind.add_first, kind.needs_dx, *kind.slope)
    block = (block_groups, tile.block_planes, tile.block_plane, tile.run)
    launch = Launcher(
        channel_norm_backward_kernel, tile.num_warps, *constants, *block, most_registers=tile.most_registers
    )

    def whole_groups(
        samples: int, plane: int, given: Tensors, out: Pair, strides: Strides, floats: tuple[float, float]
    ) -> Pair:
        device = given[0].device  # type: ignore[union-attr]
        partials = kind.partials((samples, kind.channels), device, both=False)
        groups = samples * kind.groups
        launch(
            cdiv(groups, block_groups), device, given, (*out, *partials),
            groups, *strides, plane_units(plane, kind.vec, False), *floats,
        )  # fmt: skip
        return column_sum(*partials, kind.weight, kind.dbias)

    return whole_groups


class _Pieces:
    """Sums over each piece of each plane, those of a group and those of a channel merged, then the pieces again."""

    def __init__(self, kind: _Kind) -> None:
        self.kind = kind
        length = kind.plane[0]
        mixed = kind.x is not None and kind.x.itemsize > kind.dy.itemsize
        self.tile = tile = piece_tile(
            kind.channels, longest_of(kind.plane), kind.dy.itemsize, kind.channels_last, mixed
        )
        self.blocks = cdiv(kind.channels, tile.block_channels)
        # Where dresidual is wanted it is dz, which the sums leave there: read again, it is all that dx needs of dy.
        # But for groups of one value, whose dx is 0, and would be how dz was rounded.
        dx_is_0 = kind.needs_dx and kind.channels == kind.groups and length == 1
        self.leaves_dz = kind.wanted.dresidual and not kind.add_first and not dx_is_0
        of_plane = (kind.channels, kind.groups, length, kind.vec, kind.channels_last)

        # Two tensors and more, and what is kept of them, take registers, and so programs, that loads ahead make up for.
        block = (tile.block_channels, tile.block_plane, min(3, 3 * tile.stages))

        def launcher(kernel: Any, *constants: Any) -> Launcher:
            return Launcher(kernel, tile.num_warps, *of_plane, *constants, *block, most_registers=tile.most_registers)

        self.sums = launcher(channel_gradient_sums_kernel, *kind.slope)
        self.combine = Launcher(combine_gradients_kernel, 4, *of_plane, COMBINED, *COMBINED_COLUMNS)
        slope = (None, None) if self.leaves_dz else kind.slope
        self.apply = launcher(channel_gradient_apply_kernel, kind.add_first, *slope)

    def __call__(
        self, samples: int, plane: int, given: Tensors, out: Pair, strides: Strides, floats: tuple[float, float]
    ) -> Pair:
        kind = self.kind
        dy, dtotal, x, residual, bits, weight, bias, mean, rstd = given
        dx, dresidual = out
        device = dy.device  # type: ignore[union-attr]
        steps = backward_steps(plane, kind.dy.itemsize, self.tile, samples * self.blocks, device_facts(device))
        pieces = cdiv(plane, self.tile.block_plane * steps)
        programs = samples * self.blocks * pieces
        lengths = (plane_units(plane, kind.vec, kind.channels_last), pieces, steps)
        dz = dresidual if self.leaves_dz else None
        of_dz_x_hat, of_dz = kind.partials((samples, pieces, kind.channels), device, both=kind.needs_dx)
        if dz is not None or of_dz_x_hat is not None or of_dz is not None:
            read = (dy, x, residual, bits, weight, bias, mean, rstd)
            self.sums(programs, device, read, (dz, of_dz, of_dz_x_hat), strides[0], *strides[2:], *lengths, *floats)
        mean_g, mean_g_x_hat, *parameters = self._combine(samples, (of_dz, of_dz_x_hat), weight, lengths, device)
        if kind.needs_dx:
            if dz is not None:
                dy, residual, bits, bias, dresidual = dz, None, None, None, None
                strides = [kind.channels * plane // kind.vec, *strides[1:]]
            given = (dy, dtotal, x, residual, bits, weight, bias, mean, rstd)
            self.apply(programs, device, given, (mean_g, mean_g_x_hat, dx, dresidual), *strides, *lengths, *floats)
        return parameters[0], parameters[1]

    def _combine(
        self, samples: int, sums: Pair, weight: Tensor | None, lengths: tuple[int, int, int], device: torch.device
    ) -> list[Tensor | None]:
        """[the two means of each group, dweight, dbias], each where wanted."""
        kind, groups = self.kind, 0
        mean_g = mean_g_x_hat = dweight = dbias = None
        if kind.needs_dx:
            groups = samples * kind.groups
            mean_g = torch.empty(groups, dtype=compute_dtype(kind.dy), device=device)
            mean_g_x_hat = torch.empty_like(mean_g)
        if kind.wanted.dweight:
            dweight = torch.empty(kind.channels, dtype=kind.weight, device=device)
        if kind.wanted.dbias:
            dbias = torch.empty(kind.channels, dtype=kind.dbias, device=device)
        wants_parameters = kind.wanted.dweight or kind.wanted.dbias
        programs = groups + (cdiv(kind.channels, COMBINED_COLUMNS[1]) if wants_parameters else 0)
        if programs:
            allocated = (mean_g, mean_g_x_hat, dweight, dbias)
            partial_rows = samples * lengths[1]
            self.combine(programs, device, (weight,), (*sums, *allocated), groups, partial_rows, *lengths)
        return [mean_g, mean_g_x_hat, dweight, dbias]
