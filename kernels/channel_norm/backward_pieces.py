"""The backward of groups that are cut into pieces: sums over each piece, those of a group and those of a channel
merged, then the pieces again. Of batch norm, too (see `forward_pieces`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..activations import ACTIVATIONS
from ..launch import cdiv, device_facts
from ..launcher import Launcher, Tensors
from ..problem import Tensor, Wanted, compute_dtype
from .backward_kernels import channel_gradient_apply_kernel, channel_gradient_sums_kernel, combine_gradients_kernel
from .combine import Combiner
from .config import (
    GroupPlanes,
    PlaneKind,
    backward_piece_tile,
    backward_steps,
    group_planes,
    longest_of,
    pieces_of_backward,
    plane_units,
)

COMBINED_COLUMNS = (256, 16)  # partial sums, rows and channels, that a program sums at a time
Strides = list[int]
Pair = tuple[Tensor | None, Tensor | None]
Floats = tuple[float, ...]  # the `drop_numbers` of dropout, alpha, beta


class BackwardKind(NamedTuple):
    """What the calls that one schedule serves have in common; from dy on types, None without the tensor.

    pooled: the samples share statistics; frozen: these are no functions of x."""

    channels: int
    groups: int
    plane: PlaneKind
    channels_last: bool
    pooled: bool
    frozen: bool
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
    seed: torch.dtype | None
    dbias: torch.dtype | None
    # Of a mixture of statistics: how many, and the types of their weights, whose gradients are wanted or not.
    kinds: int = 0
    mean_weight: torch.dtype | None = None
    var_weight: torch.dtype | None = None
    wants_mean_weight: bool = False
    wants_var_weight: bool = False

    @property
    def group_planes(self) -> GroupPlanes:
        """The groups, as their tile depends on them."""
        return group_planes(self.channels, self.groups, self.plane)

    @property
    def is_spread(self) -> bool:
        """Whether several columns of a matrix are one channel's."""
        return self.pooled and self.channels != self.groups

    @property
    def needs_dx(self) -> bool:
        return self.wanted.dx or (self.add_first and self.wanted.dresidual)

    @property
    def slope(self) -> tuple[Any, Any]:
        """The activation's slope, or which of its two values an element has."""
        _, slope, passes = ACTIVATIONS[self.activation]
        return slope, passes

    @property
    def mixed(self) -> bool:
        """Whether float32 is read beside 16 bits."""
        return self.x is not None and self.x.itemsize > self.dy.itemsize

    @property
    def crowded(self) -> bool:
        """Whether an element takes registers for more than dy, x, a flag, and what is made of them."""
        return self.mixed or self.dtotal is not None or self.seed is not None or self.slope[0] is not None

    def partials(self, shape: tuple[int, ...], device: torch.device, both: bool) -> Pair:
        """Uninitialized sums of dz * x_hat and of dz over planes, for dweight and dbias, or for dx as well."""
        dtype = compute_dtype(self.dy)
        of_dz_x_hat = torch.empty(shape, dtype=dtype, device=device) if both or self.wanted.dweight else None
        of_dz = torch.empty(shape, dtype=dtype, device=device) if both or self.wanted.dbias else None
        return of_dz_x_hat, of_dz


class BackwardPieces:
    """Three launches, or two where statistics are frozen."""

    def __init__(self, kind: BackwardKind) -> None:
        self.kind = kind
        length = kind.plane[0]
        self.tile = tile = backward_piece_tile(
            kind.channels, longest_of(kind.plane), kind.dy.itemsize, kind.channels_last, kind.mixed,
            kind.seed is not None, kind.is_spread, kind.kinds > 0,
        )  # fmt: skip
        self.blocks = cdiv(kind.channels, tile.block_channels)
        # Where dresidual is wanted it is dz, which the sums leave there: read again, it is all that dx needs of dy.
        # But for groups of one value, whose dx is 0, and would be how dz was rounded.
        dx_is_0 = kind.needs_dx and kind.channels == kind.groups and length == 1
        self.leaves_dz = kind.wanted.dresidual and not kind.add_first and not dx_is_0
        of_plane = (kind.channels, kind.groups, length, kind.vec, kind.channels_last)

        # Two tensors and more, and what is kept of them, take registers, and so programs, that loads ahead make up for.
        block = (*tile.block(kind.plane, kind.vec, kind.channels_last), min(3, 3 * tile.stages))

        def launcher(kernel: Any, *constants: Any, most_registers: int | None = tile.most_registers) -> Launcher:
            constants = (*of_plane, kind.pooled, kind.add_first, *constants, *block)
            return Launcher(kernel, tile.num_warps, *constants, most_registers=most_registers)

        self.sums = launcher(channel_gradient_sums_kernel, kind.frozen, *kind.slope)
        pieces = pieces_of_backward(kind.plane, kind.dy.itemsize, tile)

        def combine(*block: int) -> Launcher:
            return Launcher(combine_gradients_kernel, 4, *of_plane, kind.pooled, *block, *COMBINED_COLUMNS)

        self.combine = Combiner(combine, kind.channels, kind.groups, kind.pooled, pieces)
        slope = (None, None) if self.leaves_dz else kind.slope
        # What a mixture needs besides is needed before the tiles are: with 16 registers less a fourth program fits.
        most = 128 if kind.kinds and kind.channels_last else tile.most_registers
        self.apply = launcher(channel_gradient_apply_kernel, kind.kinds, *slope, most_registers=most)

    def __call__(self, samples: int, plane: int, given: Tensors, out: Pair, strides: Strides, floats: Floats) -> Pair:
        means, parameters, lengths = self.sum_up(samples, plane, given, out, strides, floats)
        if means[0] is not None:
            self.finish(samples, plane, given, out, (None, None, None, None, *means), strides, lengths, floats)
        return parameters

    def sum_up(
        self, samples: int, plane: int, given: Tensors, out: Pair, strides: Strides, floats: Floats
    ) -> tuple[Pair, Pair, tuple[int, int, int]]:
        """(the means that `finish` takes, if it has anything to do, (dweight, dbias) where wanted, the lengths)."""
        kind = self.kind
        weight, device = given[5], given[0].device  # type: ignore[union-attr]
        lengths = self.lengths(samples, plane, device)
        sums = kind.partials((samples, lengths[1], kind.channels), device, both=kind.needs_dx and not kind.frozen)
        self.reduce(samples, given, out, sums, strides, lengths, floats)
        means, parameters = self._combine(samples, sums, weight, lengths, device)
        return means, parameters, lengths

    def lengths(self, samples: int, plane: int, device: torch.device) -> tuple[int, int, int]:
        """(the plane's length in units, pieces of a plane, tiles of a piece)."""
        steps = backward_steps(plane, self.kind.dy.itemsize, self.tile, samples * self.blocks, device_facts(device))
        pieces = cdiv(plane, self.tile.block_plane * steps)
        return plane_units(plane, self.kind.vec, self.kind.channels_last), pieces, steps

    def reduce(
        self,
        samples: int,
        given: Tensors,
        out: Pair,
        sums: Pair,
        strides: Strides,
        lengths: tuple[int, int, int],
        floats: Floats,
    ) -> None:
        """Fills the sums of dz * x_hat and of dz over the pieces, where there are any; and what needs no sums."""
        dy, dtotal, *rest = given
        of_dz_x_hat, of_dz = sums
        dx, dresidual = out
        frozen = self.kind.frozen
        written = (dx, dresidual) if frozen else (None, dresidual if self.leaves_dz else None)
        if any(tensor is not None for tensor in (*written, of_dz_x_hat, of_dz)):
            read = (dy, dtotal if frozen else None, *rest)
            programs, device = samples * self.blocks * lengths[1], dy.device  # type: ignore[union-attr]
            self.sums(programs, device, read, (*written, of_dz, of_dz_x_hat), *strides, *lengths, *floats)

    def finish(
        self,
        samples: int,
        plane: int,
        given: Tensors,
        out: Pair,
        means: Tensors,
        strides: Strides,
        lengths: tuple[int, int, int],
        floats: Floats,
        weights: Pair = (None, None),
    ) -> None:
        """dx, and dresidual where it was not left by `reduce`, from the means of g and g * x_hat over each group, the
        last two of `means`. Before them is what a mixture needs, whose `weights` are gradients to be stored."""
        dy, dtotal, x, residual, bits, weight, bias, mean, rstd, seed = given
        dx, dresidual = out
        if self.leaves_dz:
            dy, residual, bits, bias, dresidual = dresidual, None, None, None, None
            strides = [self.kind.channels * plane // self.kind.vec, *strides[1:]]
        programs, device = samples * self.blocks * lengths[1], dy.device  # type: ignore[union-attr]
        self.apply(
            programs, device, (dy, dtotal, x, residual, bits, weight, bias, mean, rstd, seed, *means),
            (dx, dresidual, *weights), *strides, *lengths, *floats,
        )  # fmt: skip

    def _combine(
        self, samples: int, sums: Pair, weight: Tensor | None, lengths: tuple[int, int, int], device: torch.device
    ) -> tuple[Pair, Pair]:
        """The two means of each group, (dweight, dbias), each where wanted."""
        kind, wanted = self.kind, self.kind.wanted
        groups = group_programs = column_programs = 0
        group_rows = samples * lengths[1] if kind.pooled else lengths[1]
        combine, block_groups = self.combine.of(group_rows)
        mean_g = mean_g_x_hat = dweight = dbias = None
        # What was pooled has the parameters' gradients among its groups', else they are sums over the samples.
        wants_parameters = wanted.dweight or wanted.dbias
        wants_means = kind.needs_dx and not kind.frozen
        if wants_means or (kind.pooled and wants_parameters):
            groups = kind.groups if kind.pooled else samples * kind.groups
            group_programs = cdiv(groups, block_groups)
        if wants_parameters and not kind.pooled:
            column_programs = cdiv(kind.channels, COMBINED_COLUMNS[1])
        if wants_means:
            mean_g = torch.empty(groups, dtype=compute_dtype(kind.dy), device=device)
            mean_g_x_hat = torch.empty_like(mean_g)
        parameters = kind.groups if kind.pooled else kind.channels
        if wanted.dweight:
            dweight = torch.empty(parameters, dtype=kind.weight, device=device)
        if wanted.dbias:
            dbias = torch.empty(parameters, dtype=kind.dbias, device=device)
        if group_programs + column_programs:
            allocated = (mean_g, mean_g_x_hat, dweight, dbias)
            combine(
                group_programs + column_programs, device, (weight,), (*reversed(sums), *allocated),
                groups, group_programs, group_rows, samples * lengths[1], *lengths[:2],
            )  # fmt: skip
        return (mean_g, mean_g_x_hat), (dweight, dbias)
