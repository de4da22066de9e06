"""Mean and variance of a tile, the merge of partial moments, the one formula for dx: written once for every norm."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import scalar


@triton.jit
def rounded_product(a, b):
    """a * b, rounded before threads exchange it: contracted with the sum of two, each thread would add its own product
    unrounded to its neighbour's, so that they disagree about the sum."""
    return tl.fma(a, b, tl.zeros_like(a))


@triton.jit
def product_to_sum(a, b, COUNT: tl.constexpr):
    """a * b, of which COUNT are summed; of so few a thread may have but one (`rounded_product`)."""
    if COUNT <= 32:
        return rounded_product(a, b)
    else:
        return a * b


@triton.jit
def in_all_places(sums, PLANES: tl.constexpr):
    """[GROUPS, 1] as a vector [GROUPS * PLANES], each in the places of its group."""
    GROUPS: tl.constexpr = sums.shape[0]
    return tl.reshape(tl.broadcast_to(sums, [GROUPS, PLANES]), [GROUPS * PLANES])


@triton.jit
def sum_in_groups(values, PLANES: tl.constexpr):
    """Sums of neighbouring PLANES values of a vector, each in all their places."""
    if PLANES == 1:
        return values
    elif values.shape[0] % PLANES == 0:
        GROUPS: tl.constexpr = values.shape[0] // PLANES
        return in_all_places(tl.sum(tl.reshape(values, [GROUPS, PLANES]), axis=1, keep_dims=True), PLANES)
    else:
        # Each group moves to a power of two of places of its own.
        PADDED: tl.constexpr = triton.next_power_of_2(PLANES)
        OWNERS: tl.constexpr = triton.next_power_of_2((values.shape[0] + PLANES - 1) // PLANES)
        place = tl.arange(0, OWNERS * PADDED)
        index = place // PADDED * PLANES + place % PADDED
        exists = (place % PADDED < PLANES) & (index < values.shape[0])
        padded = tl.where(exists, tl.gather(values, tl.where(exists, index, 0), 0), 0.0)
        sums = tl.sum(tl.reshape(padded, [OWNERS, PADDED]), axis=1)
        return tl.gather(sums, tl.arange(0, values.shape[0]) // PLANES, 0)


@triton.jit
def sum_rows(x, PLANES: tl.constexpr, AXIS: tl.constexpr):
    """Sums of the rows of a tile along AXIS, or of PLANES neighbouring ones together, each in all their places."""
    if PLANES > 1 and AXIS == 1:
        # At once: of sums for each row, threads would exchange as many as they have rows.
        GROUPS: tl.constexpr = x.shape[0] // PLANES
        return in_all_places(tl.sum(tl.reshape(x, [GROUPS, PLANES * x.shape[1]]), axis=1, keep_dims=True), PLANES)
    else:
        return sum_in_groups(tl.sum(x, axis=AXIS), PLANES)


@triton.jit
def centered(square, shift, correction):
    """The sum of squared deviations from a mean, from those from a number near it: their sum, `shift`, which is count *
    correction, and that of their squares. Infinite where that overflowed."""
    m2 = tl.maximum(square - shift * correction, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(square == float("inf"), square, m2)


@triton.jit
def rough_moments(x, in_span, inv_count, PLANES: tl.constexpr, AXIS: tl.constexpr):
    """(rough mean, its error, m2, differences from the rough mean) of rows, as of `tile_moments`: the mean is the sum
    of the first two.

    x is scaled before summing, so that values near the type's maximum do not overflow. The rounding of that first mean
    is what the differences from it sum to: without it the error is twice torch's at a mean of 1e4 and a deviation of
    1e-2. It is small beside the deviation, so that m2, too, follows from sums about the rough mean.
    """
    COUNT: tl.constexpr = PLANES * x.shape[AXIS]
    rough_mean = sum_rows(product_to_sum(x, inv_count, COUNT), PLANES, AXIS)
    rough = tl.where(in_span, x - tl.expand_dims(rough_mean, AXIS), 0.0)
    shift = sum_rows(rough, PLANES, AXIS)
    square = sum_rows(product_to_sum(rough, rough, COUNT), PLANES, AXIS)
    correction = shift * inv_count
    return rough_mean, correction, centered(square, shift, correction), rough


@triton.jit
def tile_moments(x, in_span, inv_count, SUBTRACT_MEAN: tl.constexpr, PLANES: tl.constexpr = 1, AXIS: tl.constexpr = 1):
    """Moments of each row of a tile in registers, or of each PLANES neighbouring ones: ``(mean, m2, deviation)``.

    x and in_span are [rows, span], or with AXIS 0 [span, rows]; x is 0 where in_span is false, inv_count is 1 / (lanes
    that count). mean and m2 (the sum of squared deviations) are [rows]; without SUBTRACT_MEAN, mean is 0 and deviation
    is x. Outside of in_span the deviation is anything.
    """
    if SUBTRACT_MEAN:
        rough_mean, correction, m2, rough = rough_moments(x, in_span, inv_count, PLANES, AXIS)
        return rough_mean + correction, m2, rough - tl.expand_dims(correction, AXIS)
    else:
        m2 = sum_rows(product_to_sum(x, x, PLANES * x.shape[AXIS]), PLANES, AXIS)
        return tl.zeros_like(m2), m2, x


@triton.jit
def add_to_places(x, exists, is_first, origin, shift, square):
    """(origin, shift, square), for each place of a tile, with those of one tile more: the first value that was there,
    the sums of differences from it and of their squares. A place that has a value has had one in each tile before."""
    origin = tl.where(is_first, x, origin)
    above = tl.where(exists, x - origin, 0.0)
    return origin, shift + above, square + above * above


@triton.jit
def merge_places(length, origin, shift, square):
    """(rough mean, its error, m2) of each row of [rows, places], as of `rough_moments`, from the sums at each place;
    of each row there were `length` elements, tile after tile.

    Merged once, at the end: to merge the moments of whole tiles, threads would wait for one another at each. An origin
    far from the others costs its own place digits, but no more than it adds to m2.
    """
    PLACES: tl.constexpr = origin.shape[1]
    place = tl.arange(0, PLACES)[None, :]
    count = (tl.maximum(length - place + (PLACES - 1), 0) // PLACES).to(origin.dtype)
    inv_length = 1.0 / scalar(length, origin.dtype)  # a scalar: of the sum of counts, each thread would add up all
    # These sums overflow only where differences come near the largest number; m2 is infinite long before.
    rough_mean = tl.sum(origin * (count * inv_length) + shift * inv_length, axis=1, keep_dims=True)
    from_rough = tl.where(count > 0, origin - rough_mean, 0.0)
    added = count * from_rough
    moved = square + from_rough * (2 * shift + added)
    square = tl.sum(tl.where(square == float("inf"), square, moved), axis=1)
    shift = tl.sum(shift + added, axis=1)
    correction = shift * inv_length
    return tl.reshape(rough_mean, correction.shape), correction, centered(square, shift, correction)


@triton.jit
def reciprocal_deviation(m2, count, eps):
    """1 / sqrt(variance + eps), the variance biased."""
    return tl.math.rsqrt(m2 / count + eps)


@triton.jit
def input_gradient(g, x_hat, rstd, mean_g, mean_g_x_hat):
    """dx of x_hat = (x - mean) * rstd, given g = dL/dx_hat and its two means over the span, broadcastable to g.

    mean_g is None where no mean was subtracted.
    """
    correction = x_hat * mean_g_x_hat  # small beside g, so that of the two only one rounding counts
    if mean_g is not None:
        correction = correction + mean_g
    return (g - correction) * rstd


@triton.jit
def pairwise_sum(values, LOG2_SIZE: tl.constexpr):
    """The sum [1] of a tensor [2**LOG2_SIZE], neighbours first. A sum of two has one result, so that every bit of this
    is the same however a kernel happens to spread the tensor over its threads; that of a larger reduction, or of
    products, which are contracted with a sum, is not."""
    for _ in tl.static_range(LOG2_SIZE):
        values = tl.sum(tl.reshape(values, [values.shape[0] // 2, 2]), axis=1)
    return values


@triton.jit
def merge_chunks(
    means, m2s, eps, SPAN: tl.constexpr, CHUNK: tl.constexpr, LOG2_CHUNKS: tl.constexpr, SUBTRACT_MEAN: tl.constexpr
):
    """(mean, rstd), each [1], of a row from the moments [2**LOG2_CHUNKS] of its chunks; chunk i begins at i * CHUNK.
    Without SUBTRACT_MEAN the mean is 0."""
    first = tl.arange(0, 2**LOG2_CHUNKS).to(tl.int64) * CHUNK
    if SUBTRACT_MEAN:
        counts = tl.minimum(tl.maximum(SPAN - first, 0), CHUNK).to(m2s.dtype)
        # As differences from the first chunk's mean: at a large mean these are small, so that the sum rounds less.
        origin = pairwise_sum(tl.where(first == 0, means, 0.0), LOG2_CHUNKS)
        means = tl.where(counts > 0, means - origin, 0.0)
        mean = pairwise_sum(rounded_product(means, counts * (1.0 / SPAN)), LOG2_CHUNKS)
        deviation = means - mean
        m2 = pairwise_sum(m2s + counts * (deviation * deviation), LOG2_CHUNKS)
        return mean + origin, reciprocal_deviation(m2, SPAN, eps)
    else:
        m2 = pairwise_sum(m2s, LOG2_CHUNKS)
        return tl.zeros_like(m2), reciprocal_deviation(m2, SPAN, eps)
