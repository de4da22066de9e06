"""The statistics of switchable norm: those of each plane, each sample and each channel, mixed by learned shares.

What has a value for each is one tensor [samples * CHANNELS + samples + CHANNELS]: of the planes, in the order in which
they lie, of the samples, of the channels.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def shares(Weight_ptr, KINDS: tl.constexpr, COMPUTE: tl.constexpr):
    """The softmax of 3 or 2 weights, as (of the plane, of the sample, of the channel); of 2, a plane has none."""
    of_sample = tl.load(Weight_ptr + KINDS - 2).to(COMPUTE)
    of_channel = tl.load(Weight_ptr + KINDS - 1).to(COMPUTE)
    largest = tl.maximum(of_sample, of_channel)
    if KINDS == 3:
        of_plane = tl.load(Weight_ptr).to(COMPUTE)
        largest = tl.maximum(largest, of_plane)
        of_plane = tl.exp(of_plane - largest)
    else:
        of_plane = tl.zeros((), COMPUTE)
    of_sample, of_channel = tl.exp(of_sample - largest), tl.exp(of_channel - largest)
    scale = 1.0 / (of_plane + of_sample + of_channel)
    return of_plane * scale, of_sample * scale, of_channel * scale


@triton.jit
def load_kinds(ptr, sample, channel, in_channels, samples, CHANNELS: tl.constexpr):
    """(of the plane, of the sample, of the channel), the first and the last [channels, 1]."""
    of_plane = tl.load(ptr + sample * CHANNELS + channel, mask=in_channels, other=0.0)
    of_channel = tl.load(ptr + samples * (CHANNELS + 1) + channel, mask=in_channels, other=0.0)
    return of_plane[:, None], tl.load(ptr + samples * CHANNELS + sample), of_channel[:, None]


@triton.jit
def mixed_statistics(
    Means_ptr, Vars_ptr, MeanWeight_ptr, VarWeight_ptr, sample, channel, in_channels, samples,
    CHANNELS: tl.constexpr, KINDS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The (mean, variance), each [channels, 1], that planes of a sample are normalized by."""
    of_plane, of_sample, of_channel = load_kinds(Means_ptr, sample, channel, in_channels, samples, CHANNELS)
    _, share_sample, share_channel = shares(MeanWeight_ptr, KINDS, COMPUTE)
    # Shares add up to 1. As differences, large means lose nothing to their rounding.
    mean = of_plane + (share_sample * (of_sample - of_plane) + share_channel * (of_channel - of_plane))
    of_plane, of_sample, of_channel = load_kinds(Vars_ptr, sample, channel, in_channels, samples, CHANNELS)
    share_plane, share_sample, share_channel = shares(VarWeight_ptr, KINDS, COMPUTE)
    return mean, share_plane * of_plane + share_sample * of_sample + share_channel * of_channel


@triton.jit
def mixed_gradient_means(
    MeanG_ptr, MeanGXHat_ptr, Means_ptr, MeanWeight_ptr, VarWeight_ptr, mean, rstd, sample, channel, in_channels,
    samples, CHANNELS: tl.constexpr, KINDS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """What takes the place of the means of g and of g * x_hat in the formula for dx, each [channels, 1].

    Given for each kind of statistics are the mean of g * rstd over all elements that share them, which its mean hands
    on, and that of g * x_hat * rstd^2, which its variance does: along x minus its mean, (x_hat / rstd) + (the mixed
    mean - its mean).
    """
    g_plane, g_sample, g_channel = load_kinds(MeanG_ptr, sample, channel, in_channels, samples, CHANNELS)
    share_plane, share_sample, share_channel = shares(MeanWeight_ptr, KINDS, COMPUTE)
    mean_g = share_plane * g_plane + share_sample * g_sample + share_channel * g_channel
    v_plane, v_sample, v_channel = load_kinds(MeanGXHat_ptr, sample, channel, in_channels, samples, CHANNELS)
    share_plane, share_sample, share_channel = shares(VarWeight_ptr, KINDS, COMPUTE)
    v_plane, v_sample, v_channel = v_plane * share_plane, v_sample * share_sample, v_channel * share_channel
    of_plane, of_sample, of_channel = load_kinds(Means_ptr, sample, channel, in_channels, samples, CHANNELS)
    mean_g += v_plane * (mean - of_plane) + v_sample * (mean - of_sample) + v_channel * (mean - of_channel)
    inv_rstd = 1.0 / tl.where(in_channels[:, None], rstd, 1.0)
    return mean_g * inv_rstd, (v_plane + v_sample + v_channel) * (inv_rstd * inv_rstd)


@triton.jit
def store_weight_gradients(
    Products_ptr, MeanWeight_ptr, VarWeight_ptr, DMeanWeight_ptr, DVarWeight_ptr, samples, KINDS: tl.constexpr,
    BLOCK: tl.constexpr = 64,
):  # fmt: skip
    """The gradients of the weights of both mixtures, of which the softmax is the shares, stored by the first program:
    from what each sample adds to those of the shares, Products [samples, 6], three of the means and three of the
    variances. Nothing without Products."""
    if Products_ptr is not None:
        COMPUTE: tl.constexpr = Products_ptr.dtype.element_ty
        if tl.program_id(0) == 0:
            kind = tl.arange(0, 4)[None, :]
            of_means, of_vars = tl.zeros([BLOCK, 4], COMPUTE), tl.zeros([BLOCK, 4], COMPUTE)
            for first in tl.range(0, samples, BLOCK):
                sample = (first + tl.arange(0, BLOCK))[:, None]
                exists = (sample < samples) & (kind < 3)
                of_means += tl.load(Products_ptr + sample * 6 + kind, mask=exists, other=0.0)
                of_vars += tl.load(Products_ptr + sample * 6 + 3 + kind, mask=exists, other=0.0)
            store_softmax_gradient(DMeanWeight_ptr, MeanWeight_ptr, tl.sum(of_means, axis=0), KINDS, COMPUTE)
            store_softmax_gradient(DVarWeight_ptr, VarWeight_ptr, tl.sum(of_vars, axis=0), KINDS, COMPUTE)


@triton.jit
def store_softmax_gradient(DWeight_ptr, Weight_ptr, d_shares, KINDS: tl.constexpr, COMPUTE: tl.constexpr):
    """From the gradients [4] of the shares, those of the weights; nothing where there is nowhere to."""
    if DWeight_ptr is not None:
        of_plane, of_sample, of_channel = shares(Weight_ptr, KINDS, COMPUTE)
        kind = tl.arange(0, 4)
        share = tl.where(kind == 0, of_plane, tl.where(kind == 1, of_sample, tl.where(kind == 2, of_channel, 0.0)))
        gradient = share * (d_shares - tl.sum(share * d_shares))
        place = kind - (3 - KINDS)
        tl.store(DWeight_ptr + place, gradient.to(DWeight_ptr.dtype.element_ty), mask=(place >= 0) & (kind < 3))
