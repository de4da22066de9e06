"""Channel family, forward: statistics over groups of planes, then affine, residual and activation.

`channel_norm_forward_kernel` holds whole groups in registers and reads them once. Elsewhere the planes are cut into
pieces that programs share: `channel_moments_kernel` reduces each, `combine_moments_kernel` merges those of a group,
`channel_apply_kernel` finishes the pieces. The same pieces whatever the number of samples, so that the bits of a
sample do not depend on the batch around it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..dropout import plane_factor
from ..epilogue import activate, pre_activation, store_bits
from ..moments import add_to_places, merge_places, reciprocal_deviation, rough_moments, tile_moments
from ..tiles import columns_in_runs, load_added_residual, load_input, scalar, store_tile
from .mixture import mixed_statistics
from .planes import (
    load_of_channels,
    owners,
    piece_of_planes,
    places,
    plane_length,
    samples_of_launch,
    steps_of,
    store_plane_bits,
)


@triton.jit(do_not_specialize=["groups_in_all", "x_stride", "residual_stride", "plane_units", "threshold", "positions"])
def channel_norm_forward_kernel(
    X_ptr, Residual_ptr, Weight_ptr, Bias_ptr, Seed_ptr, Y_ptr, Total_ptr, Bits_ptr, Mean_ptr, Rstd_ptr,
    groups_in_all: tl.int64, x_stride: tl.int64, residual_stride: tl.int64, plane_units: tl.int64,
    threshold: tl.int64, positions: tl.int64, factor: tl.float64, 
    eps: tl.float64, alpha: tl.float64, beta: tl.float64,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, PLANE: tl.constexpr, VEC: tl.constexpr, ACTIVATION: tl.constexpr,
    PASSES: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_PLANES: tl.constexpr, BLOCK_PLANE: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """BLOCK_GROUPS whole groups a program, each padded to BLOCK_PLANES planes. Strides and plane_units are in units of
    VEC elements; PLANE is None where a plane's length is known at run time alone."""
    COMPUTE: tl.constexpr = tl.float64 if X_ptr.dtype.element_ty == tl.float64 else tl.float32
    GROUP_CHANNELS: tl.constexpr = CHANNELS // GROUPS
    plane = plane_length(plane_units, PLANE, VEC, False)
    index = tl.arange(0, BLOCK_GROUPS * BLOCK_PLANES)
    group = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + index // BLOCK_PLANES
    in_planes = (group < groups_in_all) & (index % BLOCK_PLANES < GROUP_CHANNELS)
    sample = group // GROUPS
    channel = group % GROUPS * GROUP_CHANNELS + index % BLOCK_PLANES
    position = tl.arange(0, BLOCK_PLANE)[None, :]
    mask = in_planes[:, None] & (position < plane)

    y_base = (sample * CHANNELS + channel) * plane
    x_base = sample * x_stride * VEC + channel * plane
    residual_base = sample * residual_stride * VEC + channel * plane
    drops = plane_factor(
        Seed_ptr, sample[:, None], channel[:, None], position, plane, positions, threshold, factor, CHANNELS, COMPUTE
    )
    col = columns_in_runs(position, RUN)
    x = load_input(X_ptr, Residual_ptr, Total_ptr, x_base, residual_base, col, mask, drops, COMPUTE)
    store_tile(Total_ptr, x, y_base, col, mask)
    # Everything that will be needed is asked for before the reduction waits for x.
    weight = load_of_channels(Weight_ptr, channel, in_planes, COMPUTE)
    bias = load_of_channels(Bias_ptr, channel, in_planes, COMPUTE)
    residual = load_added_residual(Residual_ptr, Total_ptr, residual_base, col, mask, COMPUTE)

    count = scalar(plane * GROUP_CHANNELS, COMPUTE)
    mean, m2, deviation = tile_moments(x, mask, 1.0 / count, True, BLOCK_PLANES)
    rstd = reciprocal_deviation(m2, count, scalar(eps, COMPUTE))
    z = pre_activation(deviation * rstd[:, None], weight, bias, residual)
    y = activate(z, ACTIVATION, scalar(alpha, COMPUTE), scalar(beta, COMPUTE))

    store_tile(Y_ptr, y, y_base, col, mask)
    if Mean_ptr is not None:
        first_plane = in_planes & (index % BLOCK_PLANES == 0)
        tl.store(Mean_ptr + group, mean, mask=first_plane)
        tl.store(Rstd_ptr + group, rstd, mask=first_plane)
    if Bits_ptr is not None:
        store_bits(Bits_ptr, PASSES(z), sample * CHANNELS + channel, 0, in_planes, (plane + 7) // 8)


@triton.jit
def load_input_of_planes(
    X_ptr, Residual_ptr, Seed_ptr, Total_ptr, x_base, residual_base, sample, channel, in_channels, position, plane,
    threshold, positions, factor, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, RUN: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """What is normalized of a tile [channels, positions]; a total is stored."""
    mask = in_channels[:, None] & (position < plane)
    base, col = places(channel, position, plane, CHANNELS, CHANNELS_LAST, RUN)
    drops = plane_factor(
        Seed_ptr, sample, channel[:, None], position, plane, positions, threshold, factor, CHANNELS, COMPUTE
    )
    x = load_input(X_ptr, Residual_ptr, Total_ptr, x_base + base, residual_base + base, col, mask, drops, COMPUTE)
    store_tile(Total_ptr, x, sample * CHANNELS * plane + base, col, mask)
    return x


@triton.jit(
    do_not_specialize=[
        "x_stride", "residual_stride", "plane_units", "pieces", "steps", "threshold", "positions",
    ]
)  # fmt: skip
def channel_moments_kernel(
    X_ptr, Residual_ptr, Seed_ptr, Total_ptr, Origins_ptr, Means_ptr, M2s_ptr,
    x_stride: tl.int64, residual_stride: tl.int64, plane_units: tl.int64, pieces: tl.int32, steps: tl.int64,
    threshold: tl.int64, positions: tl.int64, factor: tl.float64,
    CHANNELS: tl.constexpr, PLANE: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PLANE: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One piece of a block of planes a program: its moments, each [samples, pieces, CHANNELS]. Stores the total as it
    goes.

    The mean is in two parts, Origins_ptr and the difference from it, Means_ptr: as one number it would be rounded to
    what is no small part of a small deviation.
    """
    COMPUTE: tl.constexpr = tl.float64 if X_ptr.dtype.element_ty == tl.float64 else tl.float32
    plane = plane_length(plane_units, PLANE, VEC, CHANNELS_LAST)
    sample, first_channel, piece = piece_of_planes(tl.program_id(0), pieces, CHANNELS, BLOCK_CHANNELS)
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
    in_channels = channel < CHANNELS
    x_base, residual_base = sample * x_stride * VEC, sample * residual_stride * VEC

    first = piece * steps * BLOCK_PLANE
    place = tl.arange(0, BLOCK_PLANE)[None, :]
    if STAGES == 0:
        x = load_input_of_planes(
            X_ptr, Residual_ptr, Seed_ptr, Total_ptr, x_base, residual_base, sample, channel, in_channels,
            first + place, plane, threshold, positions, factor, CHANNELS, CHANNELS_LAST, RUN, COMPUTE,
        )  # fmt: skip
        inv_count = 1.0 / scalar(tl.minimum(plane - first, BLOCK_PLANE), COMPUTE)
        origin, mean, m2, _ = rough_moments(x, first + place < plane, inv_count, 1, 1)
    else:
        tiles = steps_of(piece, plane, steps, BLOCK_PLANE, STAGES)
        origin = tl.zeros([BLOCK_CHANNELS, BLOCK_PLANE], COMPUTE)
        shift = tl.zeros([BLOCK_CHANNELS, BLOCK_PLANE], COMPUTE)
        square = tl.zeros([BLOCK_CHANNELS, BLOCK_PLANE], COMPUTE)
        for step in tl.range(tiles, num_stages=STAGES):
            position = first + step * BLOCK_PLANE + place
            x = load_input_of_planes(
                X_ptr, Residual_ptr, Seed_ptr, Total_ptr, x_base, residual_base, sample, channel, in_channels,
                position, plane, threshold, positions, factor, CHANNELS, CHANNELS_LAST, RUN, COMPUTE,
            )  # fmt: skip
            origin, shift, square = add_to_places(x, position < plane, step == 0, origin, shift, square)
        length = tl.minimum(plane - first, tiles * BLOCK_PLANE).to(tl.int32)
        origin, mean, m2 = merge_places(length, origin, shift, square)
    partial = (sample * pieces + piece) * CHANNELS + channel
    tl.store(Origins_ptr + partial, origin, mask=in_channels)
    tl.store(Means_ptr + partial, mean, mask=in_channels)
    tl.store(M2s_ptr + partial, m2, mask=in_channels)


@triton.jit
def partials_of_groups(index, group, rows, pieces, CHANNELS: tl.constexpr, GROUPS: tl.constexpr):
    """(place, exists, piece) of partial results index [BLOCK, 1] of groups [1, BLOCK_GROUPS]. They have `rows` rows of
    CHANNELS each, one for each piece of the planes of each sample that shares the statistics. The index is int32, as of
    `piece_of_planes`."""
    GROUP_CHANNELS: tl.constexpr = CHANNELS // GROUPS
    row = index // GROUP_CHANNELS
    channel = group % GROUPS * GROUP_CHANNELS + index % GROUP_CHANNELS
    return (group // GROUPS * rows + row) * CHANNELS + channel, row < rows, row % scalar(pieces, tl.int32)


@triton.jit
def partial_means(
    Origins_ptr, Means_ptr, origin, first, group, in_groups, rows, pieces, piece_length, plane,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(count, mean, place) of BLOCK partial results of each group, means as differences from `origin`; the count is 0
    behind the last."""
    index = (scalar(first, tl.int32) + tl.arange(0, BLOCK))[:, None]
    place, exists, piece = partials_of_groups(index, group, rows, pieces, CHANNELS, GROUPS)
    exists = exists & in_groups
    count = tl.where(exists, tl.minimum(plane - piece * piece_length, piece_length), 0)
    mean = tl.load(Origins_ptr + place, mask=exists, other=0.0) - origin
    mean += tl.load(Means_ptr + place, mask=exists, other=0.0)
    return count.to(Means_ptr.dtype.element_ty), mean, place


@triton.jit
def means_of_groups(
    Origins_ptr, Means_ptr, origin, group, in_groups, rows, pieces, piece_length, plane, inv_count,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mean [1, BLOCK_GROUPS] of each group, as a difference from `origin`."""
    shares = tl.zeros([BLOCK, group.shape[1]], Means_ptr.dtype.element_ty)
    for first in tl.range(0, rows * (CHANNELS // GROUPS), BLOCK):
        count, mean, _ = partial_means(
            Origins_ptr, Means_ptr, origin, first, group, in_groups, rows, pieces, piece_length, plane,
            CHANNELS, GROUPS, BLOCK,
        )  # fmt: skip
        shares += tl.where(count > 0, mean * (count * inv_count), 0.0)
    return tl.sum(shares, axis=0, keep_dims=True)


@triton.jit
def load_running(Running_ptr, group, in_groups, COMPUTE: tl.constexpr):
    """A running statistic, None where there is none: to be asked for before what it moves towards is waited for."""
    if Running_ptr is not None:
        return tl.load(Running_ptr + group, mask=in_groups, other=0.0).to(COMPUTE)


@triton.jit
def move_statistic(Running_ptr, running, found, group, in_groups, momentum):
    """A running statistic moves towards the one that was found; None stays None."""
    if Running_ptr is not None:
        moved = (1.0 - momentum) * running + momentum * found
        tl.store(Running_ptr + group, moved.to(Running_ptr.dtype.element_ty), mask=in_groups)


@triton.jit
def moments_from_origins(
    Origins_ptr, Means_ptr, M2s_ptr, group, groups_in_all, rows, pieces, piece_length, plane,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(origin, mean as a difference from it, m2, count) of groups [1, BLOCK_GROUPS] from the moments of their channels'
    pieces; the count is of each.

    As in a tile, a rough mean comes first, the origin, and everything else as differences from it.
    """
    COMPUTE: tl.constexpr = Means_ptr.dtype.element_ty
    in_groups = group < groups_in_all
    count_in_all = scalar(plane * (CHANNELS // GROUPS) * (rows // pieces), COMPUTE)
    inv_count = 1.0 / count_in_all
    origin = means_of_groups(
        Origins_ptr, Means_ptr, tl.zeros(group.shape, COMPUTE), group, in_groups, rows, pieces, piece_length, plane,
        inv_count, CHANNELS, GROUPS, BLOCK,
    )  # fmt: skip
    shift = means_of_groups(
        Origins_ptr, Means_ptr, origin, group, in_groups, rows, pieces, piece_length, plane, inv_count,
        CHANNELS, GROUPS, BLOCK,
    )  # fmt: skip
    m2s = tl.zeros([BLOCK, group.shape[1]], COMPUTE)
    for first in tl.range(0, rows * (CHANNELS // GROUPS), BLOCK):
        count, mean, place = partial_means(
            Origins_ptr, Means_ptr, origin, first, group, in_groups, rows, pieces, piece_length, plane,
            CHANNELS, GROUPS, BLOCK,
        )  # fmt: skip
        deviation = mean - shift
        m2 = tl.load(M2s_ptr + place, mask=count > 0, other=0.0)
        m2s += m2 + tl.where(count > 0, count * (deviation * deviation), 0.0)
    return origin, shift, tl.sum(m2s, axis=0, keep_dims=True), count_in_all


@triton.jit
def moments_of_groups(
    Origins_ptr, Means_ptr, M2s_ptr, group, groups_in_all, rows, pieces, piece_length, plane,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(mean, m2, count) of groups, of which `moments_from_origins` tells the rest."""
    origin, shift, m2, count = moments_from_origins(
        Origins_ptr, Means_ptr, M2s_ptr, group, groups_in_all, rows, pieces, piece_length, plane,
        CHANNELS, GROUPS, BLOCK,
    )  # fmt: skip
    return origin + shift, m2, count


@triton.jit(do_not_specialize=["groups_in_all", "rows", "plane_units", "pieces", "steps"])
def combine_moments_kernel(
    RunningMean_ptr, RunningVar_ptr, Origins_ptr, Means_ptr, M2s_ptr, Origin_ptr, Mean_ptr, M2_ptr, Rstd_ptr,
    groups_in_all: tl.int64, rows: tl.int64, plane_units: tl.int64, pieces: tl.int64, steps: tl.int64,
    eps: tl.float64, momentum: tl.float64,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, PLANE: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_PLANE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """BLOCK_GROUPS groups a program: mean and rstd [groups_in_all] from the moments of their channels' pieces, and the
    running statistics, if any, moved. Or, for others to merge, with an origin: it, the difference of the mean from it,
    and m2."""
    COMPUTE: tl.constexpr = Means_ptr.dtype.element_ty
    plane = plane_length(plane_units, PLANE, VEC, CHANNELS_LAST)
    group = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)[None, :]
    in_groups = group < groups_in_all
    running_mean = load_running(RunningMean_ptr, group, in_groups, COMPUTE)
    running_var = load_running(RunningVar_ptr, group, in_groups, COMPUTE)
    origin, shift, m2, count = moments_from_origins(
        Origins_ptr, Means_ptr, M2s_ptr, group, groups_in_all, rows, pieces, steps * BLOCK_PLANE, plane,
        CHANNELS, GROUPS, BLOCK,
    )  # fmt: skip
    if Origin_ptr is not None:
        tl.store(Origin_ptr + group, origin, mask=in_groups)
        tl.store(Mean_ptr + group, shift, mask=in_groups)
        tl.store(M2_ptr + group, m2, mask=in_groups)
    else:
        mean = origin + shift
        tl.store(Mean_ptr + group, mean, mask=in_groups)
        tl.store(Rstd_ptr + group, reciprocal_deviation(m2, count, scalar(eps, COMPUTE)), mask=in_groups)
        weight = scalar(momentum, COMPUTE)
        move_statistic(RunningMean_ptr, running_mean, mean, group, in_groups, weight)
        move_statistic(RunningVar_ptr, running_var, m2 / (count - 1.0), group, in_groups, weight)


@triton.jit(
    do_not_specialize=[
        "x_stride", "residual_stride", "plane_units", "pieces", "steps", "threshold", "positions",
    ]
)  # fmt: skip
def channel_apply_kernel(
    X_ptr, Residual_ptr, Weight_ptr, Bias_ptr, GivenMean_ptr, GivenVar_ptr, MeanWeight_ptr, VarWeight_ptr,
    Seed_ptr, Y_ptr, Total_ptr, Bits_ptr, Mean_ptr, Rstd_ptr,
    x_stride: tl.int64, residual_stride: tl.int64, plane_units: tl.int64, pieces: tl.int32, steps: tl.int64,
    threshold: tl.int64, positions: tl.int64, factor: tl.float64, 
    eps: tl.float64, alpha: tl.float64, beta: tl.float64,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, PLANE: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    POOLED: tl.constexpr, ACTIVATION: tl.constexpr, PASSES: tl.constexpr, KINDS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PLANE: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One piece of a block of planes a program, normalized and finished. The last pieces go first: they are what
    `channel_moments_kernel` left in the cache. With given statistics, or the mixture of KINDS of them (see `mixture`),
    these are what x is normalized by, and mean and rstd, if asked for, are copies for backward."""
    COMPUTE: tl.constexpr = tl.float64 if X_ptr.dtype.element_ty == tl.float64 else tl.float32
    plane = plane_length(plane_units, PLANE, VEC, CHANNELS_LAST)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, first_channel, piece = piece_of_planes(program, pieces, CHANNELS, BLOCK_CHANNELS)
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
    in_channels = channel < CHANNELS
    group, parameter = owners(sample, channel, CHANNELS, GROUPS, POOLED)
    if GivenMean_ptr is not None:
        if KINDS > 0:
            samples = samples_of_launch(pieces, CHANNELS, BLOCK_CHANNELS)
            mean, variance = mixed_statistics(
                GivenMean_ptr, GivenVar_ptr, MeanWeight_ptr, VarWeight_ptr, sample, channel, in_channels, samples,
                CHANNELS, KINDS, COMPUTE,
            )  # fmt: skip
        else:
            mean = load_of_channels(GivenMean_ptr, group, in_channels, COMPUTE)
            variance = load_of_channels(GivenVar_ptr, group, in_channels, COMPUTE)
        rstd = reciprocal_deviation(variance, 1.0, scalar(eps, COMPUTE))
        if Mean_ptr is not None:
            place = channel % (CHANNELS // GROUPS) + piece + (sample if POOLED else 0)
            copies = in_channels & (place == 0)  # a block & a scalar is no mask to Triton 3.9's interpreter
            tl.store(Mean_ptr + group, tl.reshape(mean, group.shape), mask=copies)
            tl.store(Rstd_ptr + group, tl.reshape(rstd, group.shape), mask=copies)
    else:
        mean = load_of_channels(Mean_ptr, group, in_channels, COMPUTE)
        rstd = load_of_channels(Rstd_ptr, group, in_channels, COMPUTE)
    weight = load_of_channels(Weight_ptr, parameter, in_channels, COMPUTE)
    bias = load_of_channels(Bias_ptr, parameter, in_channels, COMPUTE)
    residual_base = sample * residual_stride * VEC
    for step in tl.range(steps_of(piece, plane, steps, BLOCK_PLANE, STAGES), num_stages=STAGES):
        first = (piece * steps + step) * BLOCK_PLANE
        position = first + tl.arange(0, BLOCK_PLANE)[None, :]
        mask = in_channels[:, None] & (position < plane)
        base, col = places(channel, position, plane, CHANNELS, CHANNELS_LAST, RUN)
        x = load_input_of_planes(
            X_ptr, Residual_ptr, Seed_ptr, Total_ptr, sample * x_stride * VEC, residual_base, sample, channel,
            in_channels, position, plane, threshold, positions, factor, CHANNELS, CHANNELS_LAST, RUN, COMPUTE,
        )  # fmt: skip
        residual = load_added_residual(Residual_ptr, Total_ptr, residual_base + base, col, mask, COMPUTE)
        z = pre_activation((x - mean) * rstd, weight, bias, residual)
        y = activate(z, ACTIVATION, scalar(alpha, COMPUTE), scalar(beta, COMPUTE))
        store_tile(Y_ptr, y, sample * CHANNELS * plane + base, col, mask)
        if Bits_ptr is not None:
            store_plane_bits(Bits_ptr, PASSES(z), sample, first_channel, first, plane, CHANNELS, CHANNELS_LAST)
