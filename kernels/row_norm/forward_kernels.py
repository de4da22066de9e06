"""Row family, forward: statistics over one contiguous span, then affine, residual and activation.

`row_norm_forward_kernel` holds whole rows in registers and reads them once. A longer row is cut into chunks: one
program walks them all, or several share them (`row_moments_kernel`, then `row_apply_kernel`). Both ways reduce each
chunk with `chunk_moments` and merge the chunks with `merge_chunks`, so a row has the same bits whichever way it
went."""

from __future__ import annotations

import triton
import triton.language as tl

from ..dropout import row_factor
from ..epilogue import activate, pre_activation, store_bits
from ..moments import add_to_places, merge_chunks, merge_places, reciprocal_deviation, tile_moments
from ..tiles import load_added_residual, load_input, scalar, store_tile


@triton.jit
def load_columns(ptr, col, in_span, COMPUTE: tl.constexpr):
    """One value a column (a weight or a bias) in the shape of col, or None."""
    if ptr is not None:
        return tl.load(ptr + col, mask=in_span, other=0.0).to(COMPUTE)


@triton.jit
def store_statistics(Mean_ptr, Rstd_ptr, row, mean, rstd, in_rows):
    if Mean_ptr is not None:
        tl.store(Mean_ptr + row, mean, mask=in_rows)
    if Rstd_ptr is not None:
        tl.store(Rstd_ptr + row, rstd, mask=in_rows)


@triton.jit(do_not_specialize=["rows", "x_stride", "residual_stride", "threshold"])
def row_norm_forward_kernel(
    X_ptr, Residual_ptr, Weight_ptr, Bias_ptr, Seed_ptr, Y_ptr, Total_ptr, Bits_ptr, Mean_ptr, Rstd_ptr,
    rows: tl.int64, x_stride: tl.int64, residual_stride: tl.int64, threshold: tl.int64, factor: tl.float64,
    eps: tl.float64, alpha: tl.float64, beta: tl.float64,
    SPAN: tl.constexpr, VEC: tl.constexpr, SUBTRACT_MEAN: tl.constexpr, ACTIVATION: tl.constexpr, PASSES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_SPAN: tl.constexpr,
):  # fmt: skip
    """One tile of whole rows a program. Strides are in units of VEC elements; y, total and the bits are contiguous."""
    COMPUTE: tl.constexpr = tl.float64 if X_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_SPAN)[None, :]
    in_rows = row < rows
    in_span = col < SPAN
    mask = in_rows[:, None] & in_span

    x_base, residual_base, y_base = row * x_stride * VEC, row * residual_stride * VEC, row * SPAN
    drops = row_factor(Seed_ptr, row, 0, threshold, factor, SPAN, BLOCK_SPAN, COMPUTE)
    x = load_input(X_ptr, Residual_ptr, Total_ptr, x_base, residual_base, col, mask, drops, COMPUTE)
    store_tile(Total_ptr, x, y_base, col, mask)
    # Everything that will be needed is asked for before the reduction waits for x.
    weight = load_columns(Weight_ptr, col, in_span, COMPUTE)
    bias = load_columns(Bias_ptr, col, in_span, COMPUTE)
    residual = load_added_residual(Residual_ptr, Total_ptr, residual_base, col, mask, COMPUTE)

    mean, m2, deviation = tile_moments(x, in_span, 1.0 / SPAN, SUBTRACT_MEAN)
    rstd = reciprocal_deviation(m2, SPAN, scalar(eps, COMPUTE))
    z = pre_activation(deviation * rstd[:, None], weight, bias, residual)
    y = activate(z, ACTIVATION, scalar(alpha, COMPUTE), scalar(beta, COMPUTE))

    store_tile(Y_ptr, y, y_base, col, mask)
    store_statistics(Mean_ptr, Rstd_ptr, row, mean, rstd, in_rows)
    if Bits_ptr is not None:
        store_bits(Bits_ptr, PASSES(z), row, 0, in_rows, (SPAN + 7) // 8)


@triton.jit
def tiles_of_chunk(chunk, SPAN: tl.constexpr, BLOCK_SPAN: tl.constexpr, STEPS: tl.constexpr):
    """How many of a chunk's STEPS tiles begin inside the row: a run-time number, or the compiler would unroll the loop
    over them, load all tiles at once and spill."""
    if STEPS == 1:
        return 1
    else:
        return tl.minimum(STEPS, tl.cdiv(SPAN - scalar(chunk, tl.int64) * STEPS * BLOCK_SPAN, BLOCK_SPAN))


@triton.jit
def load_part_of_input(
    X_ptr, Residual_ptr, Total_ptr, Seed_ptr, row, x_base, residual_base, first, threshold, factor,
    SPAN: tl.constexpr, BLOCK_SPAN: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """(x, in_span): what is normalized of BLOCK_SPAN elements of a row, from column `first` on. A total is stored."""
    col = first + tl.arange(0, BLOCK_SPAN)[None, :]
    in_span = col < SPAN
    drops = row_factor(Seed_ptr, row, first, threshold, factor, SPAN, BLOCK_SPAN, COMPUTE)
    x = load_input(X_ptr, Residual_ptr, Total_ptr, x_base, residual_base, col, in_span, drops, COMPUTE)
    store_tile(Total_ptr, x, row * SPAN, col, in_span)
    return x, in_span


@triton.jit
def chunk_moments(
    X_ptr, Residual_ptr, Total_ptr, Seed_ptr, row, x_base, residual_base, chunk, threshold, factor,
    SPAN: tl.constexpr, SUBTRACT_MEAN: tl.constexpr, BLOCK_SPAN: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """(mean, m2), each [1], of one chunk: STEPS tiles of BLOCK_SPAN."""
    first = scalar(chunk, tl.int64) * STEPS * BLOCK_SPAN
    length = tl.minimum(SPAN - first, STEPS * BLOCK_SPAN).to(tl.int32)
    if STEPS == 1:
        x, in_span = load_part_of_input(
            X_ptr, Residual_ptr, Total_ptr, Seed_ptr, row, x_base, residual_base, first, threshold, factor,
            SPAN, BLOCK_SPAN, COMPUTE,
        )  # fmt: skip
        mean, m2, _ = tile_moments(x, in_span, 1.0 / scalar(length, COMPUTE), SUBTRACT_MEAN)
        return mean, m2
    else:
        origin = tl.zeros([1, BLOCK_SPAN], COMPUTE)
        shift = tl.zeros([1, BLOCK_SPAN], COMPUTE)
        square = tl.zeros([1, BLOCK_SPAN], COMPUTE)
        tiles = tiles_of_chunk(chunk, SPAN, BLOCK_SPAN, STEPS)
        if origin.dtype == tl.float64:  # where all chunks have STEPS, the loop would be unrolled and spill
            tiles *= tl.num_programs(1)  # 1, but known at run time only
        for step in tl.range(tiles, num_stages=STAGES):
            x, in_span = load_part_of_input(
                X_ptr, Residual_ptr, Total_ptr, Seed_ptr, row, x_base, residual_base, first + step * BLOCK_SPAN,
                threshold, factor, SPAN, BLOCK_SPAN, COMPUTE,
            )  # fmt: skip
            if SUBTRACT_MEAN:
                origin, shift, square = add_to_places(x, in_span, step == 0, origin, shift, square)
            else:
                square += x * x
        if SUBTRACT_MEAN:
            mean, correction, m2 = merge_places(length, origin, shift, square)
            return mean + correction, m2
        else:
            return tl.zeros([1], COMPUTE), tl.sum(square, axis=1)


@triton.jit
def apply_chunk(
    X_ptr, Residual_ptr, Weight_ptr, Bias_ptr, Seed_ptr, Y_ptr, Total_ptr, Bits_ptr, row, x_base, residual_base,
    chunk, mean, rstd, threshold, factor, alpha, beta,
    SPAN: tl.constexpr, ACTIVATION: tl.constexpr, PASSES: tl.constexpr, BLOCK_SPAN: tl.constexpr, STEPS: tl.constexpr,
    PARTS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Normalizes and finishes one chunk, given the row's mean (or None) and rstd, PARTS of each tile, the last one
    first. A total is not stored again."""
    PART: tl.constexpr = BLOCK_SPAN // PARTS
    parts = tiles_of_chunk(chunk, SPAN, PART, STEPS * PARTS)
    for part in tl.range(parts):
        first = scalar(chunk, tl.int64) * STEPS * BLOCK_SPAN + (parts - 1 - part) * PART
        col = first + tl.arange(0, PART)[None, :]
        in_span = col < SPAN
        drops = row_factor(Seed_ptr, row, first, threshold, factor, SPAN, PART, COMPUTE)
        x = load_input(X_ptr, Residual_ptr, Total_ptr, x_base, residual_base, col, in_span, drops, COMPUTE)
        residual = load_added_residual(Residual_ptr, Total_ptr, residual_base, col, in_span, COMPUTE)
        weight = load_columns(Weight_ptr, col, in_span, COMPUTE)
        bias = load_columns(Bias_ptr, col, in_span, COMPUTE)
        if mean is not None:
            x = x - mean[:, None]
        z = pre_activation(x * rstd[:, None], weight, bias, residual)
        y = activate(z, ACTIVATION, scalar(alpha, COMPUTE), scalar(beta, COMPUTE))
        store_tile(Y_ptr, y, row * SPAN, col, in_span)
        if Bits_ptr is not None:
            store_bits(Bits_ptr, PASSES(z), row, first // 8, row >= 0, (SPAN + 7) // 8)


@triton.jit(do_not_specialize=["x_stride", "residual_stride", "threshold"])
def row_walk_forward_kernel(
    X_ptr, Residual_ptr, Weight_ptr, Bias_ptr, Seed_ptr, Y_ptr, Total_ptr, Bits_ptr, Mean_ptr, Rstd_ptr,
    x_stride: tl.int64, residual_stride: tl.int64, threshold: tl.int64, factor: tl.float64,
    eps: tl.float64, alpha: tl.float64, beta: tl.float64,
    SPAN: tl.constexpr, VEC: tl.constexpr, SUBTRACT_MEAN: tl.constexpr, ACTIVATION: tl.constexpr, PASSES: tl.constexpr,
    BLOCK_SPAN: tl.constexpr, STEPS: tl.constexpr, CHUNKS: tl.constexpr, LOG2_CHUNKS: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row a program, too long for its registers: the chunks' moments, then the chunks again, last one first, so
    that the second walk begins with what is still in the cache."""
    COMPUTE: tl.constexpr = tl.float64 if X_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    x_base = row * x_stride * VEC
    residual_base = row * residual_stride * VEC

    index = tl.arange(0, 2**LOG2_CHUNKS)
    means = tl.zeros([2**LOG2_CHUNKS], COMPUTE)
    m2s = tl.zeros([2**LOG2_CHUNKS], COMPUTE)
    for chunk in tl.range(CHUNKS, num_stages=STAGES):
        mean, m2 = chunk_moments(
            X_ptr, Residual_ptr, Total_ptr, Seed_ptr, row, x_base, residual_base, chunk, threshold, factor,
            SPAN, SUBTRACT_MEAN, BLOCK_SPAN, STEPS, STAGES, COMPUTE,
        )  # fmt: skip
        means = tl.where(index == chunk, mean, means)
        m2s = tl.where(index == chunk, m2, m2s)
    mean, rstd = merge_chunks(means, m2s, scalar(eps, COMPUTE), SPAN, BLOCK_SPAN * STEPS, LOG2_CHUNKS, SUBTRACT_MEAN)
    store_statistics(Mean_ptr, Rstd_ptr, row, mean, rstd, row >= 0)

    for chunk in range(CHUNKS):
        apply_chunk(
            X_ptr, Residual_ptr, Weight_ptr, Bias_ptr, Seed_ptr, Y_ptr, Total_ptr, Bits_ptr, row, x_base, residual_base,
            CHUNKS - 1 - chunk, mean, rstd, threshold, factor, alpha, beta,
            SPAN, ACTIVATION, PASSES, BLOCK_SPAN, STEPS, PARTS, COMPUTE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["x_stride", "residual_stride", "threshold"])
def row_moments_kernel(
    X_ptr, Residual_ptr, Seed_ptr, Total_ptr, Means_ptr, M2s_ptr, x_stride: tl.int64, residual_stride: tl.int64,
    threshold: tl.int64, factor: tl.float64,
    SPAN: tl.constexpr, VEC: tl.constexpr, SUBTRACT_MEAN: tl.constexpr, BLOCK_SPAN: tl.constexpr, STEPS: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """One chunk of one row a program: its moments into Means_ptr and M2s_ptr, both [rows, CHUNKS]."""
    COMPUTE: tl.constexpr = tl.float64 if X_ptr.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    row = program // CHUNKS
    mean, m2 = chunk_moments(
        X_ptr, Residual_ptr, Total_ptr, Seed_ptr, row, row * x_stride * VEC, row * residual_stride * VEC,
        tl.program_id(0) % CHUNKS, threshold, factor, SPAN, SUBTRACT_MEAN, BLOCK_SPAN, STEPS, 1, COMPUTE,
    )  # fmt: skip
    store_statistics(Means_ptr, M2s_ptr, program, mean, m2, row >= 0)


@triton.jit(do_not_specialize=["x_stride", "residual_stride"])
def row_apply_kernel(
    X_ptr, Residual_ptr, Weight_ptr, Bias_ptr, Y_ptr, Bits_ptr, Mean_ptr, Rstd_ptr, Means_ptr, M2s_ptr,
    x_stride: tl.int64, residual_stride: tl.int64, eps: tl.float64, alpha: tl.float64, beta: tl.float64,
    SPAN: tl.constexpr, VEC: tl.constexpr, SUBTRACT_MEAN: tl.constexpr, ACTIVATION: tl.constexpr, PASSES: tl.constexpr,
    BLOCK_SPAN: tl.constexpr, STEPS: tl.constexpr, CHUNKS: tl.constexpr, LOG2_CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """One chunk of one row a program: merges the row's moments on reading them, then finishes the chunk. The last
    chunks go first: they are what `row_moments_kernel` left in the cache."""
    COMPUTE: tl.constexpr = tl.float64 if X_ptr.dtype.element_ty == tl.float64 else tl.float32
    program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    row = program // CHUNKS + tl.arange(0, 1)
    index = tl.arange(0, 2**LOG2_CHUNKS)
    means = tl.load(Means_ptr + row * CHUNKS + index, mask=index < CHUNKS, other=0.0) if SUBTRACT_MEAN else None
    m2s = tl.load(M2s_ptr + row * CHUNKS + index, mask=index < CHUNKS, other=0.0)
    mean, rstd = merge_chunks(means, m2s, scalar(eps, COMPUTE), SPAN, BLOCK_SPAN * STEPS, LOG2_CHUNKS, SUBTRACT_MEAN)
    store_statistics(Mean_ptr, Rstd_ptr, row, mean, rstd, (program % CHUNKS + tl.arange(0, 1)) == 0)
    apply_chunk(
        X_ptr, Residual_ptr, Weight_ptr, Bias_ptr, None, Y_ptr, None, Bits_ptr, row, row * x_stride * VEC,
        row * residual_stride * VEC, program % CHUNKS, mean, rstd, 0, 1.0, alpha, beta,
        SPAN, ACTIVATION, PASSES, BLOCK_SPAN, STEPS, PARTS, COMPUTE,
    )  # fmt: skip
