"""The residual stream: activation(residual + factor * scale * x) and its gradients, element by element.

All tensors lie in memory in one order without gaps, and tiles are [groups, 8] of neighbours there, whatever their
shape: eight elements are one byte of a mask and two draws of four. What an element's scale, sample and logical index
are is told by its place, once for eight neighbours where they have it in common.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import keep_elements, keep_neighbours, keep_samples
from .epilogue import activate, load_bits, pre_activation, store_bits
from .moments import sum_in_groups
from .tiles import load_gradients, load_tile, scalar, store_tile

GROUP = tl.constexpr(8)


@triton.jit
def neighbours(BLOCK: tl.constexpr):
    """Places in a block [BLOCK / 8, 8], by the first of each group and the place in it."""
    return tl.arange(0, BLOCK // GROUP)[:, None] * GROUP, tl.arange(0, GROUP)[None, :]


@triton.jit
def exists(group, elements, RAGGED: tl.constexpr):
    """Which elements of groups that begin at these places there are. Unless RAGGED a group is whole or not there, and
    moves in one access: a compiler cannot tell it from the number of elements."""
    if RAGGED:
        return group[:, None] + tl.arange(0, GROUP)[None, :] < elements
    else:
        return (group < elements)[:, None]


@triton.jit
def quotient(base, local, size, BLOCK: tl.constexpr):
    """(base + local) // size as base // size and what to add, for places 0 <= local < BLOCK.

    Only the first division is of 64 bits, and of scalars: counted from the last multiple of `size` in reach, places
    and sizes fit 32.
    """
    first = base // size
    near = tl.minimum(size, 2 * BLOCK)
    rest = tl.maximum(base - first * size - (size - near), 0)
    return first, (rest.to(tl.int32) + local) // near.to(tl.int32)


@triton.jit
def remainder(first, more, size):
    """(first + more) % size for a scalar of 64 bits, and sizes of 31."""
    return ((first % size).to(tl.uint32) + more.to(tl.uint32)) % size.to(tl.uint32)


@triton.jit
def load_scale(Scale_ptr, base, inner, channels, BLOCK: tl.constexpr, SHARED: tl.constexpr, COMPUTE: tl.constexpr):
    """The scale of a block's elements, each that of channel (place // inner) % channels; None stays None.

    SHARED says what eight neighbours have in common: "one" channel; "two", one behind the other; or, inner being 1,
    that theirs are the "next" eight; or nothing.
    """
    if Scale_ptr is not None:
        group, place = neighbours(BLOCK)
        if SHARED == "one" or SHARED == "two":
            first, more = quotient(base, group, inner, BLOCK)
            channel = remainder(first, more, channels)
        elif SHARED == "next":
            channel = remainder(base // GROUP, group // GROUP, channels // GROUP) * GROUP + place
        else:
            first, more = quotient(base, group + place, inner, BLOCK)
            channel = remainder(first, more, channels)
        scale = tl.load(Scale_ptr + channel).to(COMPUTE)
        if SHARED == "two":
            left = (first + more + 1) * inner - (base + group)
            behind = tl.load(Scale_ptr + tl.where(channel + 1 == channels.to(tl.uint32), 0, channel + 1)).to(COMPUTE)
            scale = tl.where(place < left, scale, behind)
        return scale


@triton.jit
def logical_index(base, local, channels, positions, BLOCK: tl.constexpr):
    """The index in [samples, channels, positions] of places in memory [samples, positions, channels]."""
    first, more = quotient(base, local, channels, BLOCK)
    channel = base + local - (first + more) * channels
    sample, next_sample = quotient(first, more, positions, BLOCK)
    sample += next_sample
    return (sample * channels + channel) * positions + (first + more - sample * positions)


@triton.jit
def drop_factor(
    Seed_ptr, base, sample_size, channels, positions, element_threshold, element_factor, sample_threshold,
    sample_factor, BLOCK: tl.constexpr, DROPS_ELEMENTS: tl.constexpr, DROPS_SAMPLES: tl.constexpr,
    LAST: tl.constexpr, SHARE_SAMPLE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """What dropout and drop-path multiply a block's elements by; 1 without either."""
    group, place = neighbours(BLOCK)
    factor = scalar(1.0, COMPUTE)
    if DROPS_ELEMENTS:
        if LAST:  # channels_last: neighbours in memory are no neighbours by index
            keep = keep_elements(
                Seed_ptr, logical_index(base, group + place, channels, positions, BLOCK), element_threshold
            )
        else:
            four = base // 4 + group // 4 + tl.arange(0, GROUP // 4)[None, :]
            keep = keep_neighbours(Seed_ptr, four, element_threshold)
        factor = tl.where(keep, scalar(element_factor, COMPUTE), 0.0)
    if DROPS_SAMPLES:
        first, more = quotient(base, group if SHARE_SAMPLE else group + place, sample_size, BLOCK)
        keep_sample = keep_samples(Seed_ptr, first + more, sample_threshold)
        factor = factor * tl.where(keep_sample, scalar(sample_factor, COMPUTE), 0.0)
    return factor


@triton.jit(
    do_not_specialize=[
        "elements", "inner", "channels", "sample_size", "last_channels", "positions", "element_threshold",
        "sample_threshold",
    ]
)  # fmt: skip
def residual_add_forward_kernel(
    X_ptr, Residual_ptr, Scale_ptr, Seed_ptr, Y_ptr, Bits_ptr,
    elements: tl.int64, inner: tl.int64, channels: tl.int64, sample_size: tl.int64, last_channels: tl.int64,
    positions: tl.int64, element_threshold: tl.int64, sample_threshold: tl.int64, element_factor: tl.float64,
    sample_factor: tl.float64, alpha: tl.float64, beta: tl.float64,
    RAGGED: tl.constexpr, SHARED: tl.constexpr, DROPS_ELEMENTS: tl.constexpr, DROPS_SAMPLES: tl.constexpr,
    LAST: tl.constexpr, SHARE_SAMPLE: tl.constexpr, ACTIVATION: tl.constexpr, PASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of neighbours a program."""
    COMPUTE: tl.constexpr = tl.float64 if X_ptr.dtype.element_ty == tl.float64 else tl.float32
    base = tl.program_id(0).to(tl.int64) * BLOCK
    group = base + tl.arange(0, BLOCK // GROUP) * GROUP
    col = tl.arange(0, GROUP)[None, :]
    mask = exists(group, elements, RAGGED)
    x = load_tile(X_ptr, group, col, mask, COMPUTE)
    residual = load_tile(Residual_ptr, group, col, mask, COMPUTE)
    scale = load_scale(Scale_ptr, base, inner, channels, BLOCK, SHARED, COMPUTE)
    factor = drop_factor(
        Seed_ptr, base, sample_size, last_channels, positions, element_threshold, element_factor, sample_threshold,
        sample_factor, BLOCK, DROPS_ELEMENTS, DROPS_SAMPLES, LAST, SHARE_SAMPLE, COMPUTE,
    )  # fmt: skip
    z = pre_activation(x * factor, scale, None, residual)
    store_tile(Y_ptr, activate(z, ACTIVATION, scalar(alpha, COMPUTE), scalar(beta, COMPUTE)), group, col, mask)
    if Bits_ptr is not None:
        store_bits(Bits_ptr, PASSES(z), group // GROUP, 0, group < elements, 1)


@triton.jit
def store_scale_gradient(
    PartialDScale_ptr, sums, stripe, first, period, inner, channels,
    BLOCK: tl.constexpr, OWNED: tl.constexpr, SUMMED: tl.constexpr, WHOLE_RUNS: tl.constexpr,
):  # fmt: skip
    """Sums [BLOCK / 8, 8] over every stripes-th period, summed further over SUMMED neighbours, all of one channel: a
    row [channels] for each stripe, each pass through the channels in a period, and each sum in a channel's run."""
    if BLOCK % SUMMED == 0:
        sums = tl.sum(tl.reshape(sums, [BLOCK // SUMMED, SUMMED]), axis=1)
        index = tl.arange(0, BLOCK // SUMMED) * SUMMED
    else:
        sums = sum_in_groups(tl.reshape(sums, [BLOCK]), SUMMED)
        index = tl.arange(0, BLOCK)
    is_first = (index % SUMMED == 0) & (index < OWNED) & (first + index < period)
    if WHOLE_RUNS:
        at = stripe * (period // SUMMED) + first // SUMMED + index // SUMMED
    else:
        run, place = (first + index) // inner, (first + index) % inner
        row = (stripe * (period // (inner * channels)) + run // channels) * (inner // SUMMED) + place // SUMMED
        at = row * channels + run % channels
    tl.store(PartialDScale_ptr + at, sums, mask=is_first)


@triton.jit(
    do_not_specialize=[
        "elements", "period_groups", "periods", "stripes", "inner", "channels", "sample_size", "last_channels",
        "positions", "element_threshold", "sample_threshold",
    ]
)  # fmt: skip
def residual_add_backward_kernel(
    DY_ptr, X_ptr, Residual_ptr, Bits_ptr, Scale_ptr, Seed_ptr, DX_ptr, DResidual_ptr, PartialDScale_ptr,
    elements: tl.int64, period_groups: tl.int64, periods: tl.int64, stripes: tl.int32, inner: tl.int64,
    channels: tl.int64, sample_size: tl.int64, last_channels: tl.int64, positions: tl.int64,
    element_threshold: tl.int64, sample_threshold: tl.int64, element_factor: tl.float64, sample_factor: tl.float64,
    alpha: tl.float64, beta: tl.float64,
    RAGGED: tl.constexpr, SHARED: tl.constexpr, DROPS_ELEMENTS: tl.constexpr, DROPS_SAMPLES: tl.constexpr,
    LAST: tl.constexpr, SHARE_SAMPLE: tl.constexpr, SLOPE: tl.constexpr, PASSES: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, OWNED: tl.constexpr, SUMMED: tl.constexpr, WHOLE_RUNS: tl.constexpr,
):  # fmt: skip
    """OWNED elements of a period a program, in every stripes-th of `periods`: a whole number of runs through all
    channels, so that each element of the block keeps its channel, and its sum for dscale stays in a register."""
    COMPUTE: tl.constexpr = tl.float64 if DY_ptr.dtype.element_ty == tl.float64 else tl.float32
    first = (tl.program_id(0) // stripes).to(tl.int64) * OWNED  # of int64 a division takes a hundred instructions
    stripe = (tl.program_id(0) % stripes).to(tl.int64)
    scale = load_scale(Scale_ptr, first, inner, channels, BLOCK, SHARED, COMPUTE)
    sums = tl.zeros([BLOCK // GROUP, GROUP], COMPUTE)
    col = tl.arange(0, GROUP)[None, :]
    period = period_groups * GROUP
    for index in tl.range(stripe, periods, stripes, num_stages=STAGES):
        start = scalar(index, tl.int64) * period
        base = start + first
        place = tl.arange(0, BLOCK // GROUP) * GROUP
        group = base + place
        in_period = (place < OWNED) & (first + place < period) & (group < elements)
        mask = in_period[:, None] & exists(group, elements, RAGGED)
        passes = load_bits(Bits_ptr, group // GROUP, 0, in_period, 1, GROUP)
        factor = drop_factor(
            Seed_ptr, base, sample_size, last_channels, positions, element_threshold, element_factor,
            sample_threshold, sample_factor, BLOCK, DROPS_ELEMENTS, DROPS_SAMPLES, LAST, SHARE_SAMPLE, COMPUTE,
        )  # fmt: skip
        dropped, dz = load_gradients(
            DY_ptr, X_ptr, Residual_ptr, passes, None, factor, scale, None, group, group, group, col, mask,
            alpha, beta, SLOPE, PASSES, COMPUTE,
        )  # fmt: skip
        if PartialDScale_ptr is not None:
            sums += dz * dropped
        store_tile(DX_ptr, (dz if scale is None else dz * scale) * factor, group, col, mask)
        store_tile(DResidual_ptr, dz, group, col, mask)
    if PartialDScale_ptr is not None:
        store_scale_gradient(
            PartialDScale_ptr, sums, stripe, first, period, inner, channels, BLOCK, OWNED, SUMMED, WHOLE_RUNS
        )
