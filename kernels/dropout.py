"""What dropout and drop-path keep: Philox, keyed by a call's seed and counted by the logical index of an element.

No mask is ever stored: whoever knows the seed draws the same numbers again, backward as well as a forward that is
recomputed, in any layout and with any tile. One call of Philox gives four numbers, those of elements 4i to 4i + 3.

Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .tiles import scalar

ELEMENTS = tl.constexpr(0)  # the stream that elements draw from
SAMPLES = tl.constexpr(1)  # and the one of samples


class Rate(NamedTuple):
    """A drop rate as kernels take it: what draws below `threshold`, of 2**32, is dropped, the rest times `factor`."""

    threshold: int
    factor: float


def rate(p: float) -> Rate:
    """At p = 1 all that is kept (the threshold has 32 bits) is 0 as well, as in torch."""
    return Rate(min(round(p * 2**32), 2**32 - 1), 0.0 if p == 1.0 else 1.0 / (1.0 - p))


def rate_of(seed: torch.Tensor | None, p: float) -> Rate:
    """The rate of a call; without a seed nothing is dropped."""
    return NO_RATE if seed is None else rate(p)


NO_RATE = Rate(0, 1.0)


def drop_numbers(seed: torch.Tensor | None, p: float, positions: int) -> tuple[int, int, float]:
    """What kernels of planes are told: the threshold, the positions of one sample, the factor."""
    threshold, factor = rate_of(seed, p)
    return threshold, positions, factor


@triton.jit
def draw(Seed_ptr, counter, STREAM: tl.constexpr):
    """Four uint32 numbers for each counter (int64)."""
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(tl.load(Seed_ptr), low, high, zero + STREAM, zero)


@triton.jit
def keep_neighbours(Seed_ptr, four, threshold):
    """Which elements are kept: those with the indices 4 * four to 4 * four + 3, four [rows, n], kept [rows, 4 * n]."""
    first, second, third, fourth = draw(Seed_ptr, four, ELEMENTS)
    drawn = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(drawn, [four.shape[0], four.shape[1] * 4]) >= threshold.to(tl.uint32)


@triton.jit
def keep_elements(Seed_ptr, index, threshold):
    """Which of the elements with these indices (int64) are kept, in any order: at four times the arithmetic."""
    first, second, third, fourth = draw(Seed_ptr, index >> 2, ELEMENTS)
    place = index & 3
    drawn = tl.where(place < 2, tl.where(place == 0, first, second), tl.where(place == 2, third, fourth))
    return drawn >= threshold.to(tl.uint32)


@triton.jit
def row_factor(
    Seed_ptr, row, first, threshold, factor, SPAN: tl.constexpr, COLUMNS: tl.constexpr, COMPUTE: tl.constexpr
):
    """What dropout multiplies COLUMNS elements, from column `first` on, of rows of SPAN by; None without it."""
    if Seed_ptr is not None:
        if SPAN % 4 == 0:
            four = (row * (SPAN // 4))[:, None] + (first // 4 + tl.arange(0, COLUMNS // 4)[None, :])
            keep = keep_neighbours(Seed_ptr, four, threshold)
        else:
            index = (row * SPAN)[:, None] + (first + tl.arange(0, COLUMNS)[None, :])
            keep = keep_elements(Seed_ptr, index, threshold)
        return tl.where(keep, scalar(factor, COMPUTE), 0.0)


@triton.jit
def plane_factor(
    Seed_ptr, sample, channel, position, plane, positions, threshold, factor,
    CHANNELS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """What dropout multiplies elements of [samples, CHANNELS, plane] by, given their places, which broadcast to a tile;
    None without it. `positions` are those of one sample, where a plane goes through several."""
    if Seed_ptr is not None:
        sample = sample * (plane // positions) + position // positions
        index = (sample * CHANNELS + channel) * positions + position % positions
        return tl.where(keep_elements(Seed_ptr, index, threshold), scalar(factor, COMPUTE), 0.0)


@triton.jit
def keep_samples(Seed_ptr, sample, threshold):
    """Which samples (int64) are kept."""
    drawn, _, _, _ = draw(Seed_ptr, sample, SAMPLES)
    return drawn >= threshold.to(tl.uint32)
