"""What merges the pieces of planes for switchable norm, in one launch each way: to what each plane has for itself, each
sample and each channel. A program has one sample, or a block of planes or of channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import scalar
from .backward_kernels import store_sums
from .forward_kernels import load_running, moments_of_groups, move_statistic
from .mixture import store_weight_gradients
from .planes import plane_length


@triton.jit
def merge_groups(
    Origins_ptr, Means_ptr, M2s_ptr, KindMeans_ptr, KindVars_ptr, place, first, groups, pieces, length, plane,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of each of BLOCK_GROUPS groups of a sample's planes."""
    group = first + tl.arange(0, BLOCK_GROUPS)[None, :]
    mean, m2, count = moments_of_groups(
        Origins_ptr, Means_ptr, M2s_ptr, group, groups, pieces, pieces, length, plane, CHANNELS, GROUPS, BLOCK
    )
    tl.store(KindMeans_ptr + place + group, mean, mask=group < groups)
    tl.store(KindVars_ptr + place + group, m2 / count, mask=group < groups)


@triton.jit
def merge_channels(
    RunningMean_ptr, RunningVar_ptr, Origins_ptr, Means_ptr, M2s_ptr, KindMeans_ptr, KindVars_ptr, place, first,
    rows, pieces, length, plane, momentum,
    CHANNELS: tl.constexpr, FROZEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of each of BLOCK_CHANNELS channels, to which running statistics move, or these."""
    COMPUTE: tl.constexpr = Means_ptr.dtype.element_ty
    channel = first + tl.arange(0, BLOCK_CHANNELS)[None, :]
    in_channels = channel < CHANNELS
    running_mean = load_running(RunningMean_ptr, channel, in_channels, COMPUTE)
    running_var = load_running(RunningVar_ptr, channel, in_channels, COMPUTE)
    if FROZEN:
        mean, variance = running_mean, running_var
    else:
        mean, m2, count = moments_of_groups(
            Origins_ptr, Means_ptr, M2s_ptr, channel, CHANNELS, rows, pieces, length, plane, CHANNELS, CHANNELS, BLOCK
        )
        variance = m2 / count
        weight = scalar(momentum, COMPUTE)
        move_statistic(RunningMean_ptr, running_mean, mean, channel, in_channels, weight)
        move_statistic(RunningVar_ptr, running_var, m2 / (count - 1.0), channel, in_channels, weight)
    tl.store(KindMeans_ptr + place + channel, mean, mask=in_channels)
    tl.store(KindVars_ptr + place + channel, variance, mask=in_channels)


@triton.jit(do_not_specialize=["samples", "plane_units", "pieces", "steps"])
def combine_switch_moments_kernel(
    RunningMean_ptr, RunningVar_ptr, Origins_ptr, Means_ptr, M2s_ptr, KindMeans_ptr, KindVars_ptr,
    samples: tl.int64, plane_units: tl.int64, pieces: tl.int64, steps: tl.int64, momentum: tl.float64,
    CHANNELS: tl.constexpr, PLANE: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_PLANE: tl.constexpr, FROZEN: tl.constexpr,
    BLOCK_PIECES: tl.constexpr, BLOCK_PLANES: tl.constexpr, BLOCK_SAMPLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The mean and biased variance of each plane, sample and channel (see `mixture`); running statistics move, or,
    FROZEN, are the channels'."""
    plane = plane_length(plane_units, PLANE, VEC, CHANNELS_LAST)
    length, planes = steps * BLOCK_PLANE, samples * CHANNELS
    program = tl.program_id(0).to(tl.int64)
    plane_programs = tl.cdiv(planes, BLOCK_PLANES)
    if program < plane_programs:
        merge_groups(
            Origins_ptr, Means_ptr, M2s_ptr, KindMeans_ptr, KindVars_ptr, 0, program * BLOCK_PLANES, planes, pieces,
            length, plane, CHANNELS, CHANNELS, BLOCK_PIECES, BLOCK_PLANES,
        )  # fmt: skip
    elif program < plane_programs + samples:
        merge_groups(
            Origins_ptr, Means_ptr, M2s_ptr, KindMeans_ptr, KindVars_ptr, planes, program - plane_programs, samples,
            pieces, length, plane, CHANNELS, 1, BLOCK_SAMPLE, 1,
        )  # fmt: skip
    else:
        merge_channels(
            RunningMean_ptr, RunningVar_ptr, Origins_ptr, Means_ptr, M2s_ptr, KindMeans_ptr, KindVars_ptr,
            planes + samples, (program - plane_programs - samples) * BLOCK_CHANNELS, samples * pieces, pieces, length,
            plane, momentum, CHANNELS, FROZEN, BLOCK_ROWS, BLOCK_CHANNELS,
        )  # fmt: skip


@triton.jit
def load_sums(
    DZSums_ptr, DZXHatSums_ptr, Weight_ptr, Rstd_ptr, place, plane, channel, exists, COMPUTE: tl.constexpr
):  # fmt: skip
    """Partial sums of dz and of dz * x_hat, and of g * rstd and g * x_hat * rstd^2, g = dz * weight."""
    dz = tl.load(DZSums_ptr + place, mask=exists, other=0.0)
    dz_x_hat = tl.load(DZXHatSums_ptr + place, mask=exists, other=0.0)
    rstd = tl.load(Rstd_ptr + plane, mask=exists, other=0.0)
    scale = rstd
    if Weight_ptr is not None:
        scale = rstd * tl.load(Weight_ptr + channel, mask=exists, other=0.0).to(COMPUTE)
    return dz, dz_x_hat, dz * scale, dz_x_hat * (scale * rstd)


@triton.jit
def combine_planes(
    DZSums_ptr, DZXHatSums_ptr, Weight_ptr, Rstd_ptr, MeanG_ptr, MeanGXHat_ptr, first, planes, pieces, inv_count,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PLANES: tl.constexpr,
):  # fmt: skip
    """Means over each of BLOCK_PLANES planes."""
    COMPUTE: tl.constexpr = DZSums_ptr.dtype.element_ty
    plane = first + tl.arange(0, BLOCK_PLANES)[None, :]
    sample, channel = plane // CHANNELS, plane % CHANNELS
    g, g_x_hat = tl.zeros([BLOCK, BLOCK_PLANES], COMPUTE), tl.zeros([BLOCK, BLOCK_PLANES], COMPUTE)
    for start in tl.range(0, pieces, BLOCK):
        piece = (scalar(start, tl.int64) + tl.arange(0, BLOCK))[:, None]
        exists = (piece < pieces) & (plane < planes)
        place = (sample * pieces + piece) * CHANNELS + channel
        _, _, more_g, more_g_x_hat = load_sums(
            DZSums_ptr, DZXHatSums_ptr, Weight_ptr, Rstd_ptr, place, plane, channel, exists, COMPUTE
        )
        g += more_g
        g_x_hat += more_g_x_hat
    store_sums(MeanG_ptr, tl.sum(g, axis=0, keep_dims=True) * inv_count, plane, plane < planes)
    store_sums(MeanGXHat_ptr, tl.sum(g_x_hat, axis=0, keep_dims=True) * inv_count, plane, plane < planes)


@triton.jit
def combine_sample(
    DZSums_ptr, DZXHatSums_ptr, Weight_ptr, Rstd_ptr, KindMeans_ptr, KindVars_ptr, MeanG_ptr, MeanGXHat_ptr,
    Products_ptr, sample, samples, pieces, inv_count, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Means over a sample, and what it adds to the gradients of the shares: of each kind the sum over planes of the
    gradient of a mixed mean (variance) times the kind's mean (variance). Means count as differences from the plane's:
    what all kinds have in common no share that adds up to 1 moves."""
    COMPUTE: tl.constexpr = DZSums_ptr.dtype.element_ty
    sample_place, channel_place = samples * CHANNELS + sample, samples * (CHANNELS + 1)
    g, g_x_hat = tl.zeros([BLOCK], COMPUTE), tl.zeros([BLOCK], COMPUTE)
    by_sample, by_channel = tl.zeros([BLOCK], COMPUTE), tl.zeros([BLOCK], COMPUTE)
    by_plane_var, by_channel_var = tl.zeros([BLOCK], COMPUTE), tl.zeros([BLOCK], COMPUTE)
    of_sample = tl.load(KindMeans_ptr + sample_place)
    for start in tl.range(0, pieces * CHANNELS, BLOCK):
        index = scalar(start, tl.int64) + tl.arange(0, BLOCK)
        exists = index < pieces * CHANNELS
        channel = index % CHANNELS
        plane = sample * CHANNELS + channel
        _, _, more_g, more_g_x_hat = load_sums(
            DZSums_ptr, DZXHatSums_ptr, Weight_ptr, Rstd_ptr, sample * pieces * CHANNELS + index, plane, channel,
            exists, COMPUTE,
        )  # fmt: skip
        g += more_g
        g_x_hat += more_g_x_hat
        if Products_ptr is not None:
            of_plane = tl.load(KindMeans_ptr + plane, mask=exists, other=0.0)
            by_sample += more_g * (of_sample - of_plane)
            by_channel += more_g * (tl.load(KindMeans_ptr + channel_place + channel, mask=exists, other=0.0) - of_plane)
            by_plane_var += more_g_x_hat * tl.load(KindVars_ptr + plane, mask=exists, other=0.0)
            by_channel_var += more_g_x_hat * tl.load(KindVars_ptr + channel_place + channel, mask=exists, other=0.0)
    sum_g_x_hat = tl.sum(g_x_hat)
    if MeanG_ptr is not None:
        tl.store(MeanG_ptr + sample_place, tl.sum(g) * inv_count)
        tl.store(MeanGXHat_ptr + sample_place, sum_g_x_hat * inv_count)
    if Products_ptr is not None:
        of_sample = tl.load(KindVars_ptr + sample_place)
        tl.store(Products_ptr + sample * 6, tl.zeros((), COMPUTE))
        tl.store(Products_ptr + sample * 6 + 1, -tl.sum(by_sample))
        tl.store(Products_ptr + sample * 6 + 2, -tl.sum(by_channel))
        tl.store(Products_ptr + sample * 6 + 3, -0.5 * tl.sum(by_plane_var))
        tl.store(Products_ptr + sample * 6 + 4, -0.5 * sum_g_x_hat * of_sample)
        tl.store(Products_ptr + sample * 6 + 5, -0.5 * tl.sum(by_channel_var))


@triton.jit
def combine_channels(
    DZSums_ptr, DZXHatSums_ptr, Weight_ptr, Rstd_ptr, MeanG_ptr, MeanGXHat_ptr, DWeight_ptr, DBias_ptr, first,
    samples, pieces, inv_count, CHANNELS: tl.constexpr, FROZEN: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Means over each of BLOCK_CHANNELS channels, 0 where their statistics are FROZEN, and dweight and dbias."""
    COMPUTE: tl.constexpr = DZSums_ptr.dtype.element_ty
    channel = first + tl.arange(0, BLOCK_CHANNELS)[None, :]
    in_channels = channel < CHANNELS
    dbias, dweight = tl.zeros([BLOCK, BLOCK_CHANNELS], COMPUTE), tl.zeros([BLOCK, BLOCK_CHANNELS], COMPUTE)
    g, g_x_hat = tl.zeros([BLOCK, BLOCK_CHANNELS], COMPUTE), tl.zeros([BLOCK, BLOCK_CHANNELS], COMPUTE)
    for start in tl.range(0, samples * pieces, BLOCK):
        row = (scalar(start, tl.int64) + tl.arange(0, BLOCK))[:, None]
        exists = (row < samples * pieces) & in_channels
        dz, dz_x_hat, more_g, more_g_x_hat = load_sums(
            DZSums_ptr, DZXHatSums_ptr, Weight_ptr, Rstd_ptr, row * CHANNELS + channel,
            row // pieces * CHANNELS + channel, channel, exists, COMPUTE,
        )  # fmt: skip
        dbias += dz
        dweight += dz_x_hat
        g += more_g
        g_x_hat += more_g_x_hat
    if DBias_ptr is not None:
        total = tl.sum(dbias, axis=0, keep_dims=True)
        tl.store(DBias_ptr + channel, total.to(DBias_ptr.dtype.element_ty), mask=in_channels)
    if DWeight_ptr is not None:
        total = tl.sum(dweight, axis=0, keep_dims=True)
        tl.store(DWeight_ptr + channel, total.to(DWeight_ptr.dtype.element_ty), mask=in_channels)
    place = samples * (CHANNELS + 1)
    if FROZEN:
        store_sums(MeanG_ptr, tl.zeros([1, BLOCK_CHANNELS], COMPUTE), place + channel, in_channels)
        store_sums(MeanGXHat_ptr, tl.zeros([1, BLOCK_CHANNELS], COMPUTE), place + channel, in_channels)
    else:
        store_sums(MeanG_ptr, tl.sum(g, axis=0, keep_dims=True) * inv_count, place + channel, in_channels)
        store_sums(MeanGXHat_ptr, tl.sum(g_x_hat, axis=0, keep_dims=True) * inv_count, place + channel, in_channels)


@triton.jit(do_not_specialize=["samples", "plane_units", "pieces"])
def combine_switch_gradients_kernel(
    Weight_ptr, Rstd_ptr, KindMeans_ptr, KindVars_ptr, DZSums_ptr, DZXHatSums_ptr,
    MeanG_ptr, MeanGXHat_ptr, DWeight_ptr, DBias_ptr, Products_ptr,
    samples: tl.int64, plane_units: tl.int64, pieces: tl.int64,
    CHANNELS: tl.constexpr, PLANE: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, FROZEN: tl.constexpr,
    BLOCK_PIECES: tl.constexpr, BLOCK_PLANES: tl.constexpr, BLOCK_SAMPLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """What each plane, sample and channel hands on to x (see `mixture.mixed_gradient_means`); dweight and dbias; and
    Products [samples, 6] (see `combine_sample`)."""
    COMPUTE: tl.constexpr = DZSums_ptr.dtype.element_ty
    plane = plane_length(plane_units, PLANE, VEC, CHANNELS_LAST)
    program = tl.program_id(0).to(tl.int64)
    plane_programs = tl.cdiv(samples * CHANNELS, BLOCK_PLANES)
    if program < plane_programs:
        if MeanG_ptr is not None:
            combine_planes(
                DZSums_ptr, DZXHatSums_ptr, Weight_ptr, Rstd_ptr, MeanG_ptr, MeanGXHat_ptr, program * BLOCK_PLANES,
                samples * CHANNELS, pieces, 1.0 / scalar(plane, COMPUTE), CHANNELS, BLOCK_PIECES, BLOCK_PLANES,
            )  # fmt: skip
    elif program < plane_programs + samples:
        combine_sample(
            DZSums_ptr, DZXHatSums_ptr, Weight_ptr, Rstd_ptr, KindMeans_ptr, KindVars_ptr, MeanG_ptr, MeanGXHat_ptr,
            Products_ptr, program - plane_programs, samples, pieces, 1.0 / scalar(plane * CHANNELS, COMPUTE),
            CHANNELS, BLOCK_SAMPLE,
        )  # fmt: skip
    else:
        combine_channels(
            DZSums_ptr, DZXHatSums_ptr, Weight_ptr, Rstd_ptr, MeanG_ptr, MeanGXHat_ptr, DWeight_ptr, DBias_ptr,
            (program - plane_programs - samples) * BLOCK_CHANNELS, samples, pieces,
            1.0 / scalar(plane * samples, COMPUTE), CHANNELS, FROZEN, BLOCK_ROWS, BLOCK_CHANNELS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["samples"])
def mixing_gradients_kernel(
    MeanWeight_ptr, VarWeight_ptr, Products_ptr, DMeanWeight_ptr, DVarWeight_ptr, samples: tl.int64,
    KINDS: tl.constexpr,
):  # fmt: skip
    """The gradients of the mixtures' weights, where no launch that computes dx follows to store them."""
    store_weight_gradients(Products_ptr, MeanWeight_ptr, VarWeight_ptr, DMeanWeight_ptr, DVarWeight_ptr, samples, KINDS)
