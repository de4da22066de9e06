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
from .config import (
    GroupPlanes,
    PlaneKind,
    backward_steps,
    combine_tile,
    forward_steps,
    group_planes,
    longest_of,
    piece_tile,
    plane_units,
)
from .forward_kernels import channel_apply_kernel, channel_moments_kernel, combine_moments_kernel

Floats = tuple[float, float, float]
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
    running_mean: torch.dtype | None = None
    running_var: torch.dtype | None = None

    @property
    def group_planes(self) -> GroupPlanes:
        """The groups, as their tile depends on them."""
        return group_planes(self.channels, self.groups, self.plane, self.x.itemsize)

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
        self.tile = tile = piece_tile(kind.channels, longest_of(kind.plane), kind.x.itemsize, kind.channels_last)
        block = (tile.block_channels, tile.block_plane, tile.stages)
        self.blocks = cdiv(kind.channels, tile.block_channels)

        def launcher(kernel: Any, *constants: Any) -> Launcher:
            return Launcher(kernel, tile.num_warps, *constants, most_registers=tile.most_registers)

        of_plane = (kind.channels, kind.groups, length, kind.vec, kind.channels_last)
        self.moments = launcher(channel_moments_kernel, kind.channels, length, kind.vec, kind.channels_last, *block)
        block_partials, self.block_groups = combine_tile(kind.channels // kind.groups)
        self.combine = Launcher(
            combine_moments_kernel, 4, *of_plane, tile.block_plane, block_partials, self.block_groups
        )
        constants = (kind.pooled, *kind.functions, *block)
        self.apply_given = launcher(channel_apply_kernel, *of_plane, *constants)
        # The total that it reads has no gaps.
        self.apply_vec = kind.dense_vec if kind.add_first else kind.vec
        self.apply_found = launcher(
            channel_apply_kernel, kind.channels, kind.groups, length, self.apply_vec, kind.channels_last, *constants
        )

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
        x, residual, weight, bias = given
        y, total, mean, rstd, bits = out
        eps, device = floats[0], y.device
        programs, units, pieces, steps = self._programs(samples, plane, kind.vec, device)
        means = torch.empty((samples, pieces, kind.channels), dtype=compute_dtype(y.dtype), device=device)
        origins, m2s = torch.empty_like(means), torch.empty_like(means)
        groups = kind.groups if kind.pooled else samples * kind.groups
        if mean is None:
            mean = torch.empty(groups, dtype=means.dtype, device=device)
            rstd = torch.empty_like(mean)
        added = residual if kind.add_first else None
        moments = (origins, means, m2s)
        self.moments(programs, device, (x, added), (total, *moments), *strides, units, pieces, steps)
        rows = samples * pieces if kind.pooled else pieces
        self.combine(
            cdiv(groups, self.block_groups), device, running, (*moments, mean, rstd),
            groups, rows, units, pieces, steps, eps, momentum,
        )  # fmt: skip
        if kind.add_first:
            x, residual, strides = total, None, (kind.channels * plane // self.apply_vec, 0)
            _, units, _, _ = self._programs(samples, plane, self.apply_vec, device)
        self.apply_found(
            programs, device, (x, residual, weight, bias, None, None), (y, None, bits, mean, rstd),
            *strides, units, pieces, steps, *floats,
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
        """By statistics that are given."""
        device = out.y.device
        programs, *lengths = self._programs(samples, plane, self.kind.vec, device)
        y, total, mean, rstd, bits = out
        self.apply_given(
            programs, device, (*given, *running), (y, total, bits, mean, rstd), *strides, *lengths, *floats
        )

    def _programs(self, samples: int, plane: int, vec: int, device: torch.device) -> tuple[int, int, int, int]:
        """(programs, the plane's length in units, pieces of a plane, tiles of a piece)."""
        itemsize, blocks = self.kind.x.itemsize, samples * self.blocks
        if self.kind.pooled:  # no sample's bits depend on itself alone
            steps = backward_steps(plane, itemsize, self.tile, blocks, device_facts(device))
        else:
            steps = forward_steps(plane, itemsize, self.tile)
        pieces = cdiv(plane, self.tile.block_plane * steps)
        return blocks * pieces, plane_units(plane, vec, self.kind.channels_last), pieces, steps
