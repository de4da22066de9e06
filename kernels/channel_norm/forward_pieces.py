"""The forward of groups that are cut into pieces: their moments, those of a group merged, then the pieces again.

Of batch norm, too, whose groups are pooled: their statistics are those of all samples, or running ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..activations import ACTIVATIONS
from ..launch import cdiv, device_facts
from ..launcher import Launcher, Tensors
from ..problem import Forward, Tensor, compute_dtype
from .combine import Combiner
from .config import (
    GroupPlanes,
    PlaneKind,
    backward_steps,
    forward_piece_tile,
    forward_steps,
    group_planes,
    longest_of,
    pieces_of_forward,
    plane_units,
)
from .forward_kernels import channel_apply_kernel, channel_moments_kernel, combine_moments_kernel

Floats = tuple[float, ...]  # the `drop_numbers` of dropout, eps, alpha, beta
Running = tuple[Tensor | None, Tensor | None]


class ForwardKind(NamedTuple):
    """What the calls that one schedule serves have in common; from x on types, None without the tensor.

    dense_vec: elements of the widest access where samples follow one another without gaps.
    pooled: the samples share statistics.
    """

    channels: int
    groups: int
    plane: PlaneKind
    channels_last: bool
    pooled: bool
    vec: int
    dense_vec: int
    add_first: bool
    activation: str | None
    save_bits: bool
    save_statistics: bool
    x: torch.dtype
    residual: torch.dtype | None
    weight: torch.dtype | None
    bias: torch.dtype | None
    seed: torch.dtype | None = None
    running_mean: torch.dtype | None = None
    running_var: torch.dtype | None = None
    # Of a mixture of statistics: how many, and the types of their weights.
    kinds: int = 0
    mean_weight: torch.dtype | None = None
    var_weight: torch.dtype | None = None

    @property
    def group_planes(self) -> GroupPlanes:
        """The groups, as their tile depends on them."""
        return group_planes(self.channels, self.groups, self.plane)

    @property
    def waiting(self) -> int:
        """As in `group_forward_tile`: x or the total, and a residual that is added afterwards."""
        return 1 + (self.residual is not None and not self.add_first)

    @property
    def is_spread(self) -> bool:
        """Whether several columns of a matrix are one channel's."""
        return self.pooled and self.channels != self.groups

    @property
    def functions(self) -> tuple[Any, Any]:
        """The activation's value, and which of its slope's two values an element has."""
        functions = ACTIVATIONS[self.activation]
        return functions.value, functions.passes if self.save_bits else None


class ForwardPieces:
    """Three launches, or, where statistics are given, the last one alone."""

    def __init__(self, kind: ForwardKind) -> None:
        self.kind = kind
        length, _ = kind.plane
        drops = kind.seed is not None
        longest, itemsize = longest_of(kind.plane), kind.x.itemsize
        self.tile = tile = forward_piece_tile(
            kind.channels,
            longest,
            itemsize,
            kind.channels_last,
            drops=drops,
            spread=kind.is_spread,
            mixes=kind.kinds > 0,
        )
        self.blocks = cdiv(kind.channels, tile.block_channels)

        def launcher(kernel: Any, *constants: Any, most: int | None = tile.most_registers) -> Launcher:
            return Launcher(kernel, tile.num_warps, *constants, most_registers=most)

        of_plane = (kind.channels, kind.groups, length, kind.vec, kind.channels_last)
        # The values of each place take registers, and so programs, that loads ahead make up for; but for one tile.
        stages = max(tile.stages, min(3, 3 * tile.stages))
        # With 16 registers less than alone a fourth program fits.
        most = 128 if stages or kind.channels_last else None
        block = tile.block(kind.plane, kind.vec, kind.channels_last)
        of_moments = (kind.channels, length, kind.vec, kind.channels_last, *block, stages)
        self.moments = launcher(channel_moments_kernel, *of_moments, most=most)
        pieces = pieces_of_forward(kind.plane, itemsize, tile)

        def combine(*block: int) -> Launcher:
            return Launcher(combine_moments_kernel, 4, *of_plane, tile.block_plane, *block)

        # One for each: what it stores, and what not, is part of what a launcher compiled.
        self.combine, self.combine_in_parts = (
            Combiner(combine, kind.channels, kind.groups, kind.pooled, pieces) for _ in range(2)
        )

        def apply(vec: int) -> Launcher:
            of_plane = (kind.channels, kind.groups, length, vec, kind.channels_last)
            block = (*tile.block(kind.plane, vec, kind.channels_last), tile.stages)
            return launcher(channel_apply_kernel, *of_plane, kind.pooled, *kind.functions, kind.kinds, *block)

        self.apply_given = apply(kind.vec)
        self.apply_vec = kind.dense_vec if kind.add_first else kind.vec
        self.apply_found = apply(self.apply_vec)

    def __call__(
        self,
        samples: int,
        plane: int,
        given: Tensors,
        out: Forward,
        strides: tuple[int, int],
        floats: Floats,
        running: Running = (None, None),
        momentum: float = 0.0,
    ) -> None:
        """By the statistics of x; the running ones, if any, move towards them."""
        kind = self.kind
        y, total, mean, rstd, bits = out
        moments, *lengths = self.reduce(samples, plane, given, total, strides, floats)
        if mean is None:
            groups = kind.groups if kind.pooled else samples * kind.groups
            mean = torch.empty(groups, dtype=compute_dtype(y.dtype), device=y.device)
            rstd = torch.empty_like(mean)
        self.merge(samples, moments, lengths, (None, mean, None, rstd), running, floats[-3], momentum)
        self.finish(samples, plane, given, Forward(y, total, mean, rstd, bits), strides, floats)

    def reduce(
        self, samples: int, plane: int, given: Tensors, total: Tensor | None, strides: tuple[int, int], floats: Floats
    ) -> tuple[Tensors, int, int, int]:
        """((origins, means, m2s) of the pieces, the plane's length in units, pieces of a plane, tiles of a piece)."""
        x, residual, _, _, seed = given
        device = x.device  # type: ignore[union-attr]
        programs, units, pieces, steps = self._programs(samples, plane, self.kind.vec, device)
        shape = (samples, pieces, self.kind.channels)
        means = torch.empty(shape, dtype=compute_dtype(self.kind.x), device=device)
        moments = (torch.empty_like(means), means, torch.empty_like(means))
        added = residual if self.kind.add_first else None
        lengths = (units, pieces, steps)
        self.moments(programs, device, (x, added, seed), (total, *moments), *strides, *lengths, *floats[:3])
        return moments, units, pieces, steps

    def merge(
        self,
        samples: int,
        moments: Tensors,
        lengths: list[int],
        found: Tensors,
        running: Running = (None, None),
        eps: float = 0.0,
        momentum: float = 0.0,
    ) -> None:
        """Fills `found` with (None, mean, None, rstd) of the groups, or with (origin, mean - origin, m2, None)."""
        groups = self.kind.groups if self.kind.pooled else samples * self.kind.groups
        units, pieces, steps = lengths
        rows = samples * pieces if self.kind.pooled else pieces
        combiner = self.combine_in_parts if found[3] is None else self.combine
        combine, block_groups = combiner.of(rows)
        combine(
            cdiv(groups, block_groups), moments[0].device, running, (*moments, *found),  # type: ignore[union-attr]
            groups, rows, units, pieces, steps, eps, momentum,
        )  # fmt: skip

    def finish(
        self,
        samples: int,
        plane: int,
        given: Tensors,
        out: Forward,
        strides: tuple[int, int],
        floats: Floats,
        statistics: Tensors = (None, None, None, None),
    ) -> None:
        """By mean and rstd of `out`, or by statistics that are given, with the weights of their mixture, if any."""
        y, total, mean, rstd, bits = out
        x, residual, weight, bias, seed = given
        if self.kind.add_first:  # the total that is read has no gaps
            x, residual, seed, strides = total, None, None, (self.kind.channels * plane // self.apply_vec, 0)
        programs, *lengths = self._programs(samples, plane, self.apply_vec, y.device)
        self.apply_found(
            programs, y.device, (x, residual, weight, bias, *statistics, seed), (y, None, bits, mean, rstd),
            *strides, *lengths, *floats,
        )  # fmt: skip

    def by_running_statistics(
        self,
        samples: int,
        plane: int,
        given: Tensors,
        out: Forward,
        strides: tuple[int, int],
        floats: Floats,
        running: Running,
    ) -> None:
        """By statistics that are given, in one launch."""
        device = out.y.device
        programs, *lengths = self._programs(samples, plane, self.kind.vec, device)
        y, total, mean, rstd, bits = out
        *operands, seed = given
        given = (*operands, *running, None, None, seed)
        self.apply_given(programs, device, given, (y, total, bits, mean, rstd), *strides, *lengths, *floats)

    def _programs(self, samples: int, plane: int, vec: int, device: torch.device) -> tuple[int, int, int, int]:
        """(programs, the plane's length in units, pieces of a plane, tiles of a piece)."""
        itemsize, blocks = self.kind.x.itemsize, samples * self.blocks
        if self.kind.pooled:  # no sample's bits depend on itself alone
            steps = backward_steps(plane, itemsize, self.tile, blocks, device_facts(device))
        else:
            steps = forward_steps(plane, itemsize, self.tile)
        pieces = cdiv(plane, self.tile.block_plane * steps)
        return blocks * pieces, plane_units(plane, vec, self.kind.channels_last), pieces, steps
