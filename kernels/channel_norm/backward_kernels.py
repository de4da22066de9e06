"""Channel family, backward: dx, dresidual, and sums over planes of dz and of dz * x_hat, from which all else follows:
dbias and dweight by summing over samples, the two means of the dx formula by summing over a group with its weights.

`channel_norm_backward_kernel` holds whole groups and reads them once. Elsewhere `channel_gradient_sums_kernel` reduces
each piece of the planes, `combine_gradients_kernel` merges, `channel_gradient_apply_kernel` finishes the pieces.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..column_sum import sum_columns
from ..dropout import plane_factor
from ..epilogue import load_bits
from ..moments import input_gradient, product_to_sum, rounded_product, sum_in_groups
from ..tiles import columns_in_runs, load_gradients, scalar, store_gradients
from .forward_kernels import partials_of_groups
from .mixture import mixed_gradient_means, store_weight_gradients
from .planes import (
    load_of_channels,
    load_plane_bits,
    owners,
    piece_of_planes,
    places,
    plane_length,
    samples_of_launch,
    steps_of,
)


@triton.jit
def store_sums(ptr, values, place, mask):
    if ptr is not None:
        tl.store(ptr + place, values, mask=mask)


@triton.jit(
    do_not_specialize=[
        "groups_in_all", "dy_stride", "dtotal_stride", "x_stride", "residual_stride", "plane_units", "threshold",
        "positions",
    ]
)  # fmt: skip
def channel_norm_backward_kernel(
    DY_ptr, DTotal_ptr, X_ptr, Residual_ptr, Bits_ptr, Weight_ptr, Bias_ptr, Mean_ptr, Rstd_ptr, Seed_ptr,
    DX_ptr, DResidual_ptr, PartialDWeight_ptr, PartialDBias_ptr,
    groups_in_all: tl.int64, dy_stride: tl.int64, dtotal_stride: tl.int64, x_stride: tl.int64,
    residual_stride: tl.int64, plane_units: tl.int64,
    threshold: tl.int64, positions: tl.int64, factor: tl.float64, alpha: tl.float64, beta: tl.float64,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, PLANE: tl.constexpr, VEC: tl.constexpr, ADD_FIRST: tl.constexpr,
    NEEDS_DX: tl.constexpr, SLOPE: tl.constexpr, PASSES: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, BLOCK_PLANES: tl.constexpr, BLOCK_PLANE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """BLOCK_GROUPS whole groups a program, as in the forward; partial sums [samples, CHANNELS]."""
    COMPUTE: tl.constexpr = tl.float64 if DY_ptr.dtype.element_ty == tl.float64 else tl.float32
    GROUP_CHANNELS: tl.constexpr = CHANNELS // GROUPS
    plane = plane_length(plane_units, PLANE, VEC, False)
    index = tl.arange(0, BLOCK_GROUPS * BLOCK_PLANES)
    group = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + index // BLOCK_PLANES
    in_planes = (group < groups_in_all) & (index % BLOCK_PLANES < GROUP_CHANNELS)
    sample = group // GROUPS
    channel = group % GROUPS * GROUP_CHANNELS + index % BLOCK_PLANES
    plane_index = sample * CHANNELS + channel
    position = tl.arange(0, BLOCK_PLANE)[None, :]
    mask = in_planes[:, None] & (position < plane)

    base = (sample * CHANNELS + channel) * plane
    dy_base, dtotal_base = sample * dy_stride * VEC + channel * plane, sample * dtotal_stride * VEC + channel * plane
    x_base, residual_base = sample * x_stride * VEC + channel * plane, sample * residual_stride * VEC + channel * plane
    mean = load_of_channels(Mean_ptr, group, in_planes, COMPUTE)
    rstd = load_of_channels(Rstd_ptr, group, in_planes, COMPUTE)
    weight = load_of_channels(Weight_ptr, channel, in_planes, COMPUTE)
    bias = load_of_channels(Bias_ptr, channel, in_planes, COMPUTE)
    passes = load_bits(Bits_ptr, plane_index, 0, in_planes, (plane + 7) // 8, BLOCK_PLANE)
    col = columns_in_runs(position, RUN)
    x_hat, dz = load_gradients(
        DY_ptr, X_ptr, Residual_ptr, passes, mean, rstd, weight, bias, dy_base, x_base, residual_base, col, mask,
        alpha, beta, SLOPE, PASSES, COMPUTE,
    )  # fmt: skip
    sum_dz = tl.sum(product_to_sum(dz, 1.0, BLOCK_PLANE), axis=1)  # dz, too, is a product
    store_sums(PartialDBias_ptr, sum_dz, plane_index, in_planes)
    dx = None
    if X_ptr is not None:
        sum_dz_x_hat = tl.sum(product_to_sum(dz, x_hat, BLOCK_PLANE), axis=1)
        store_sums(PartialDWeight_ptr, sum_dz_x_hat, plane_index, in_planes)
        if NEEDS_DX:
            g = dz
            if weight is not None:
                g = dz * weight
                sum_dz = rounded_product(sum_dz, tl.reshape(weight, sum_dz.shape))
                sum_dz_x_hat = rounded_product(sum_dz_x_hat, tl.reshape(weight, sum_dz.shape))
            inv_count = 1.0 / scalar(plane * GROUP_CHANNELS, COMPUTE)
            mean_g = (sum_in_groups(sum_dz, BLOCK_PLANES) * inv_count)[:, None]
            mean_g_x_hat = (sum_in_groups(sum_dz_x_hat, BLOCK_PLANES) * inv_count)[:, None]
            dx = input_gradient(g, x_hat, rstd, mean_g, mean_g_x_hat)
    drops = plane_factor(
        Seed_ptr, sample[:, None], channel[:, None], position, plane, positions, threshold, factor, CHANNELS, COMPUTE
    )
    store_gradients(DX_ptr, DResidual_ptr, DTotal_ptr, dx, dz, base, dtotal_base, col, mask, drops, ADD_FIRST, COMPUTE)


@triton.jit(
    do_not_specialize=[
        "dy_stride", "dtotal_stride", "x_stride", "residual_stride", "plane_units", "pieces", "steps", "threshold",
        "positions",
    ]
)  # fmt: skip
def channel_gradient_sums_kernel(
    DY_ptr, DTotal_ptr, X_ptr, Residual_ptr, Bits_ptr, Weight_ptr, Bias_ptr, Mean_ptr, Rstd_ptr, Seed_ptr,
    DX_ptr, DResidual_ptr, DZSums_ptr, DZXHatSums_ptr,
    dy_stride: tl.int64, dtotal_stride: tl.int64, x_stride: tl.int64, residual_stride: tl.int64,
    plane_units: tl.int64, pieces: tl.int32, steps: tl.int64,
    threshold: tl.int64, positions: tl.int64, factor: tl.float64, alpha: tl.float64, beta: tl.float64,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, PLANE: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    POOLED: tl.constexpr, ADD_FIRST: tl.constexpr, FROZEN: tl.constexpr, SLOPE: tl.constexpr, PASSES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PLANE: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One piece of a block of planes a program: its sums of dz and of dz * x_hat, each [samples, pieces, CHANNELS].
    Where dresidual is wanted, it is dz, and stored here for `channel_gradient_apply_kernel` to read. FROZEN, mean and
    rstd are no functions of x, so that dx needs no sums, and everything is stored here."""
    COMPUTE: tl.constexpr = tl.float64 if DY_ptr.dtype.element_ty == tl.float64 else tl.float32
    plane = plane_length(plane_units, PLANE, VEC, CHANNELS_LAST)
    sample, first_channel, piece = piece_of_planes(tl.program_id(0), pieces, CHANNELS, BLOCK_CHANNELS)
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
    in_channels = channel < CHANNELS
    group, parameter = owners(sample, channel, CHANNELS, GROUPS, POOLED)
    mean = load_of_channels(Mean_ptr, group, in_channels, COMPUTE)
    rstd = load_of_channels(Rstd_ptr, group, in_channels, COMPUTE)
    weight = load_of_channels(Weight_ptr, parameter, in_channels, COMPUTE)
    bias = load_of_channels(Bias_ptr, parameter, in_channels, COMPUTE)
    sums_dz = tl.zeros([BLOCK_CHANNELS, BLOCK_PLANE], COMPUTE)
    sums_dz_x_hat = tl.zeros([BLOCK_CHANNELS, BLOCK_PLANE], COMPUTE)
    for step in tl.range(steps_of(piece, plane, steps, BLOCK_PLANE, STAGES), num_stages=STAGES):
        first = (piece * steps + step) * BLOCK_PLANE
        position = first + tl.arange(0, BLOCK_PLANE)[None, :]
        mask = in_channels[:, None] & (position < plane)
        base, col = places(channel, position, plane, CHANNELS, CHANNELS_LAST, RUN)
        passes = load_plane_bits(
            Bits_ptr, sample, first_channel, first, plane, CHANNELS, CHANNELS_LAST, BLOCK_CHANNELS, BLOCK_PLANE
        )
        x_hat, dz = load_gradients(
            DY_ptr, X_ptr, Residual_ptr, passes, mean, rstd, weight, bias, sample * dy_stride * VEC + base,
            sample * x_stride * VEC + base, sample * residual_stride * VEC + base, col, mask, alpha, beta,
            SLOPE, PASSES, COMPUTE,
        )  # fmt: skip
        dx = None
        if FROZEN and rstd is not None:
            dx = (dz * weight if weight is not None else dz) * rstd
        # dx will be that of dz as it is rounded there, and so are its means.
        if not FROZEN and DResidual_ptr is not None:
            dz = dz.to(DResidual_ptr.dtype.element_ty).to(COMPUTE)
        # Of a single tile nothing is added up: a compiler could not leave out an addition to 0.0.
        if DZSums_ptr is not None:
            sums_dz = dz if STAGES == 0 else sums_dz + dz
        if DZXHatSums_ptr is not None:
            product = product_to_sum(dz, x_hat, BLOCK_PLANE)
            sums_dz_x_hat = product if STAGES == 0 else sums_dz_x_hat + product
        drops = plane_factor(
            Seed_ptr, sample, channel[:, None], position, plane, positions, threshold, factor, CHANNELS, COMPUTE
        )
        store_gradients(
            DX_ptr, DResidual_ptr, DTotal_ptr, dx, dz, sample * CHANNELS * plane + base,
            sample * dtotal_stride * VEC + base, col, mask, drops, ADD_FIRST, COMPUTE,
        )  # fmt: skip
    partial = (sample * pieces + piece) * CHANNELS + channel
    store_sums(DZSums_ptr, tl.sum(sums_dz, axis=1), partial, in_channels)
    store_sums(DZXHatSums_ptr, tl.sum(sums_dz_x_hat, axis=1), partial, in_channels)


@triton.jit
def sums_of_groups(
    Sums_ptr, Weight_ptr, Mean_ptr, DParameter_ptr, group, groups_in_all, rows, pieces, inv_count,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, POOLED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial sums of the groups [1, BLOCK_GROUPS] summed, with weights, to a mean, and POOLED, where a group has but
    one weight, to the gradient of a parameter."""
    WEIGHS_EACH: tl.constexpr = Weight_ptr is not None and not POOLED
    if Mean_ptr is not None or (POOLED and DParameter_ptr is not None):
        COMPUTE: tl.constexpr = Sums_ptr.dtype.element_ty
        in_groups = group < groups_in_all
        sums = tl.zeros([BLOCK, group.shape[1]], COMPUTE)
        for first in tl.range(0, rows * (CHANNELS // GROUPS), BLOCK):
            index = (scalar(first, tl.int32) + tl.arange(0, BLOCK))[:, None]
            place, exists, _ = partials_of_groups(index, group, rows, pieces, CHANNELS, GROUPS)
            values = tl.load(Sums_ptr + place, mask=exists & in_groups, other=0.0)
            if WEIGHS_EACH:
                values *= tl.load(Weight_ptr + place % CHANNELS, mask=exists & in_groups, other=0.0).to(COMPUTE)
            sums += values
        total = tl.sum(sums, axis=0, keep_dims=True)
        if POOLED and DParameter_ptr is not None:
            tl.store(DParameter_ptr + group, total.to(DParameter_ptr.dtype.element_ty), mask=in_groups)
        if Mean_ptr is not None:
            mean = total * inv_count
            if POOLED and Weight_ptr is not None:
                mean *= tl.load(Weight_ptr + group, mask=in_groups, other=0.0).to(COMPUTE)
            tl.store(Mean_ptr + group, mean, mask=in_groups)


@triton.jit(do_not_specialize=["groups_in_all", "group_programs", "rows", "partial_rows", "plane_units", "pieces"])
def combine_gradients_kernel(
    Weight_ptr, DZSums_ptr, DZXHatSums_ptr, MeanG_ptr, MeanGXHat_ptr, DWeight_ptr, DBias_ptr,
    groups_in_all: tl.int64, group_programs: tl.int64, rows: tl.int64, partial_rows: tl.int32,
    plane_units: tl.int64, pieces: tl.int64,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, PLANE: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    POOLED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The first group_programs programs: the means of g = dz * weight and of g * x_hat over BLOCK_GROUPS groups, each
    [groups_in_all], and POOLED, dweight and dbias of them. The others: dweight and dbias of a block of channels."""
    COMPUTE: tl.constexpr = DZSums_ptr.dtype.element_ty if DZSums_ptr is not None else DZXHatSums_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    if program < group_programs:
        plane = plane_length(plane_units, PLANE, VEC, CHANNELS_LAST)
        inv_count = 1.0 / scalar(plane * (CHANNELS // GROUPS) * (rows // pieces), COMPUTE)
        group = program * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)[None, :]
        sums_of_groups(
            DZSums_ptr, Weight_ptr, MeanG_ptr, DBias_ptr, group, groups_in_all, rows, pieces, inv_count,
            CHANNELS, GROUPS, POOLED, BLOCK,
        )  # fmt: skip
        sums_of_groups(
            DZXHatSums_ptr, Weight_ptr, MeanGXHat_ptr, DWeight_ptr, group, groups_in_all, rows, pieces, inv_count,
            CHANNELS, GROUPS, POOLED, BLOCK,
        )  # fmt: skip
    elif not POOLED:
        col = (program - group_programs) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
        sum_columns(DZXHatSums_ptr, DWeight_ptr, partial_rows, col, CHANNELS, BLOCK_ROWS)
        sum_columns(DZSums_ptr, DBias_ptr, partial_rows, col, CHANNELS, BLOCK_ROWS)


@triton.jit(
    do_not_specialize=[
        "dy_stride", "dtotal_stride", "x_stride", "residual_stride", "plane_units", "pieces", "steps", "threshold",
        "positions",
    ]
)  # fmt: skip
def channel_gradient_apply_kernel(
    DY_ptr, DTotal_ptr, X_ptr, Residual_ptr, Bits_ptr, Weight_ptr, Bias_ptr, Mean_ptr, Rstd_ptr, Seed_ptr,
    KindMeans_ptr, MeanWeight_ptr, VarWeight_ptr, Products_ptr, MeanG_ptr, MeanGXHat_ptr,
    DX_ptr, DResidual_ptr, DMeanWeight_ptr, DVarWeight_ptr,
    dy_stride: tl.int64, dtotal_stride: tl.int64, x_stride: tl.int64, residual_stride: tl.int64,
    plane_units: tl.int64, pieces: tl.int32, steps: tl.int64,
    threshold: tl.int64, positions: tl.int64, factor: tl.float64, alpha: tl.float64, beta: tl.float64,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, PLANE: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    POOLED: tl.constexpr, ADD_FIRST: tl.constexpr, KINDS: tl.constexpr, SLOPE: tl.constexpr, PASSES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PLANE: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One piece of a block of planes a program: dx, from the means over its groups. The last pieces go first. Of a
    mixture of KINDS of statistics (see `mixture`), the first program stores the gradients of its weights, too."""
    COMPUTE: tl.constexpr = tl.float64 if DY_ptr.dtype.element_ty == tl.float64 else tl.float32
    plane = plane_length(plane_units, PLANE, VEC, CHANNELS_LAST)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, first_channel, piece = piece_of_planes(program, pieces, CHANNELS, BLOCK_CHANNELS)
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
    in_channels = channel < CHANNELS
    group, parameter = owners(sample, channel, CHANNELS, GROUPS, POOLED)
    mean = load_of_channels(Mean_ptr, group, in_channels, COMPUTE)
    rstd = load_of_channels(Rstd_ptr, group, in_channels, COMPUTE)
    samples = samples_of_launch(pieces, CHANNELS, BLOCK_CHANNELS)
    if KINDS > 0:
        mean_g, mean_g_x_hat = mixed_gradient_means(
            MeanG_ptr, MeanGXHat_ptr, KindMeans_ptr, MeanWeight_ptr, VarWeight_ptr, mean, rstd, sample, channel,
            in_channels, samples, CHANNELS, KINDS, COMPUTE,
        )  # fmt: skip
    else:
        mean_g = load_of_channels(MeanG_ptr, group, in_channels, COMPUTE)
        mean_g_x_hat = load_of_channels(MeanGXHat_ptr, group, in_channels, COMPUTE)
    weight = load_of_channels(Weight_ptr, parameter, in_channels, COMPUTE)
    bias = load_of_channels(Bias_ptr, parameter, in_channels, COMPUTE)
    for step in tl.range(steps_of(piece, plane, steps, BLOCK_PLANE, STAGES), num_stages=STAGES):
        first = (piece * steps + step) * BLOCK_PLANE
        position = first + tl.arange(0, BLOCK_PLANE)[None, :]
        mask = in_channels[:, None] & (position < plane)
        base, col = places(channel, position, plane, CHANNELS, CHANNELS_LAST, RUN)
        passes = load_plane_bits(
            Bits_ptr, sample, first_channel, first, plane, CHANNELS, CHANNELS_LAST, BLOCK_CHANNELS, BLOCK_PLANE
        )
        x_hat, dz = load_gradients(
            DY_ptr, X_ptr, Residual_ptr, passes, mean, rstd, weight, bias, sample * dy_stride * VEC + base,
            sample * x_stride * VEC + base, sample * residual_stride * VEC + base, col, mask, alpha, beta,
            SLOPE, PASSES, COMPUTE,
        )  # fmt: skip
        g = dz * weight if weight is not None else dz
        dx = input_gradient(g, x_hat, rstd, mean_g, mean_g_x_hat)
        drops = plane_factor(
            Seed_ptr, sample, channel[:, None], position, plane, positions, threshold, factor, CHANNELS, COMPUTE
        )
        store_gradients(
            DX_ptr, DResidual_ptr, DTotal_ptr, dx, dz, sample * CHANNELS * plane + base,
            sample * dtotal_stride * VEC + base, col, mask, drops, ADD_FIRST, COMPUTE,
        )  # fmt: skip
    store_weight_gradients(Products_ptr, MeanWeight_ptr, VarWeight_ptr, DMeanWeight_ptr, DVarWeight_ptr, samples, KINDS)
