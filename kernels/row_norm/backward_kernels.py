"""Row family, backward: dx, dresidual and bounded partial sums of dweight and dbias.

`row_norm_backward_kernel` holds whole rows and reads them once; a program takes many tiles, so that the parameter
gradients build up in registers. A longer row is walked twice by one program (`row_walk_backward_kernel`) where there
are no parameter gradients. Where there are, or rows are few, it takes two launches: `row_gradient_sums_kernel` reduces
each chunk of each row, and `row_gradient_apply_kernel`, one block of columns a program, goes down the rows with those
sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..dropout import row_factor
from ..epilogue import load_bits
from ..moments import input_gradient, product_to_sum
from ..tiles import load_gradients, scalar, store_gradients
from .forward_kernels import load_columns, tiles_of_chunk


@triton.jit
def load_statistics(ptr, row, in_rows, COMPUTE: tl.constexpr):
    """One value a row (a mean or an rstd) as [rows, 1], or None."""
    if ptr is not None:
        return tl.load(ptr + row, mask=in_rows, other=0.0).to(COMPUTE)[:, None]


@triton.jit
def load_row_gradients(
    DY_ptr, X_ptr, Residual_ptr, Bits_ptr, Mean_ptr, Rstd_ptr, weight, bias, row, in_rows, first, col, mask,
    dy_stride, x_stride, residual_stride, alpha, beta,
    SPAN: tl.constexpr, VEC: tl.constexpr, SLOPE: tl.constexpr, PASSES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """(x_hat, rstd, dz) of one tile; without x the first two are nothing to use (see `load_gradients`)."""
    passes = load_bits(Bits_ptr, row, first // 8, in_rows, (SPAN + 7) // 8, col.shape[1])
    mean = load_statistics(Mean_ptr, row, in_rows, COMPUTE)
    rstd = load_statistics(Rstd_ptr, row, in_rows, COMPUTE)
    x_hat, dz = load_gradients(
        DY_ptr, X_ptr, Residual_ptr, passes, mean, rstd, weight, bias,
        row * dy_stride * VEC, row * x_stride * VEC, row * residual_stride * VEC, col, mask, alpha, beta,
        SLOPE, PASSES, COMPUTE,
    )  # fmt: skip
    if rstd is None:
        return x_hat, dz, dz
    else:
        return x_hat, rstd, dz


@triton.jit
def store_column_sums(Partial_ptr, sums, partial_row, col, in_span, SPAN: tl.constexpr):
    """Writes a tile [rows, columns], summed over its rows, as row `partial_row` of a partial gradient."""
    if Partial_ptr is not None:
        offsets = partial_row.to(tl.int64) * SPAN + col
        tl.store(Partial_ptr + offsets, tl.sum(sums, axis=0, keep_dims=True), mask=in_span)


@triton.jit(do_not_specialize=["rows", "dy_stride", "dtotal_stride", "x_stride", "residual_stride", "threshold"])
def row_norm_backward_kernel(
    DY_ptr, DTotal_ptr, X_ptr, Residual_ptr, Bits_ptr, Weight_ptr, Bias_ptr, Mean_ptr, Rstd_ptr, Seed_ptr,
    DX_ptr, DResidual_ptr, PartialDWeight_ptr, PartialDBias_ptr,
    rows: tl.int64, dy_stride: tl.int64, dtotal_stride: tl.int64, x_stride: tl.int64, residual_stride: tl.int64,
    threshold: tl.int64, factor: tl.float64, alpha: tl.float64, beta: tl.float64,
    SPAN: tl.constexpr, VEC: tl.constexpr, SUBTRACT_MEAN: tl.constexpr, ADD_FIRST: tl.constexpr, NEEDS_DX: tl.constexpr,
    SLOPE: tl.constexpr, PASSES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SPAN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th tile of whole rows; partial sums [programs, SPAN]."""
    COMPUTE: tl.constexpr = tl.float64 if DY_ptr.dtype.element_ty == tl.float64 else tl.float32
    col = tl.arange(0, BLOCK_SPAN)[None, :]
    in_span = col < SPAN
    # Loaded for each row: loaded as one it would be spread over all warps, and the compiler lays the tile out like it.
    cols = tl.broadcast_to(col, [BLOCK_ROWS, BLOCK_SPAN])
    weight = load_columns(Weight_ptr, cols, cols < SPAN, COMPUTE)
    bias = load_columns(Bias_ptr, cols, cols < SPAN, COMPUTE)
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_SPAN], COMPUTE)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_SPAN], COMPUTE)

    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = scalar(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        in_rows = row < rows
        mask = in_rows[:, None] & in_span
        x_hat, rstd, dz = load_row_gradients(
            DY_ptr, X_ptr, Residual_ptr, Bits_ptr, Mean_ptr, Rstd_ptr, weight, bias, row, in_rows, 0, col, mask,
            dy_stride, x_stride, residual_stride, alpha, beta, SPAN, VEC, SLOPE, PASSES, COMPUTE,
        )  # fmt: skip
        if PartialDWeight_ptr is not None:
            dweight += dz * x_hat
        if PartialDBias_ptr is not None:
            dbias += dz
        dx = None
        if NEEDS_DX:
            g = dz * weight if weight is not None else dz
            mean_g_x_hat = tl.sum(product_to_sum(g, x_hat, g.shape[1]), axis=1)[:, None] * (1.0 / SPAN)
            mean_g = tl.sum(g, axis=1)[:, None] * (1.0 / SPAN) if SUBTRACT_MEAN else None
            dx = input_gradient(g, x_hat, rstd, mean_g, mean_g_x_hat)
        drops = row_factor(Seed_ptr, row, 0, threshold, factor, SPAN, BLOCK_SPAN, COMPUTE)
        store_gradients(
            DX_ptr, DResidual_ptr, DTotal_ptr, dx, dz, row * SPAN, row * dtotal_stride * VEC, col, mask, drops,
            ADD_FIRST, COMPUTE,
        )  # fmt: skip

    store_column_sums(PartialDWeight_ptr, dweight, tl.program_id(0), col, in_span, SPAN)
    store_column_sums(PartialDBias_ptr, dbias, tl.program_id(0), col, in_span, SPAN)


@triton.jit
def load_part_of_row(
    DY_ptr, X_ptr, Residual_ptr, Bits_ptr, Weight_ptr, Bias_ptr, Mean_ptr, Rstd_ptr, row, first,
    dy_stride, x_stride, residual_stride, alpha, beta,
    SPAN: tl.constexpr, VEC: tl.constexpr, SLOPE: tl.constexpr, PASSES: tl.constexpr,
    BLOCK_SPAN: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """(col, in_span, x_hat, rstd, g, dz) of BLOCK_SPAN elements of a row [1], from column `first` on; g = dL/dx_hat."""
    col = first + tl.arange(0, BLOCK_SPAN)[None, :]
    in_span = col < SPAN
    weight = load_columns(Weight_ptr, col, in_span, COMPUTE)
    bias = load_columns(Bias_ptr, col, in_span, COMPUTE)
    x_hat, rstd, dz = load_row_gradients(
        DY_ptr, X_ptr, Residual_ptr, Bits_ptr, Mean_ptr, Rstd_ptr, weight, bias, row, row >= 0, first, col, in_span,
        dy_stride, x_stride, residual_stride, alpha, beta, SPAN, VEC, SLOPE, PASSES, COMPUTE,
    )  # fmt: skip
    g = dz * weight if weight is not None else dz
    return col, in_span, x_hat, rstd, g, dz


@triton.jit
def sum_row_gradients(
    DY_ptr, X_ptr, Residual_ptr, Bits_ptr, Weight_ptr, Bias_ptr, Mean_ptr, Rstd_ptr, row, chunk,
    dy_stride, x_stride, residual_stride, alpha, beta,
    SPAN: tl.constexpr, VEC: tl.constexpr, SLOPE: tl.constexpr, PASSES: tl.constexpr,
    BLOCK_SPAN: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Sums [1] of g = dL/dx_hat and of g * x_hat over one chunk of a row: STEPS tiles of BLOCK_SPAN."""
    sum_g = tl.zeros([1, BLOCK_SPAN], COMPUTE)
    sum_g_x_hat = tl.zeros([1, BLOCK_SPAN], COMPUTE)
    for step in tl.range(tiles_of_chunk(chunk, SPAN, BLOCK_SPAN, STEPS), num_stages=STAGES):
        first = (scalar(chunk, tl.int64) * STEPS + step) * BLOCK_SPAN
        _, _, x_hat, _, g, _ = load_part_of_row(
            DY_ptr, X_ptr, Residual_ptr, Bits_ptr, Weight_ptr, Bias_ptr, Mean_ptr, Rstd_ptr, row, first,
            dy_stride, x_stride, residual_stride, alpha, beta, SPAN, VEC, SLOPE, PASSES, BLOCK_SPAN, COMPUTE,
        )  # fmt: skip
        sum_g += g
        sum_g_x_hat += g * x_hat
    return tl.sum(sum_g, axis=1), tl.sum(sum_g_x_hat, axis=1)


@triton.jit(do_not_specialize=["dy_stride", "dtotal_stride", "x_stride", "residual_stride", "threshold"])
def row_walk_backward_kernel(
    DY_ptr, DTotal_ptr, X_ptr, Residual_ptr, Bits_ptr, Weight_ptr, Bias_ptr, Mean_ptr, Rstd_ptr, Seed_ptr,
    DX_ptr, DResidual_ptr,
    dy_stride: tl.int64, dtotal_stride: tl.int64, x_stride: tl.int64, residual_stride: tl.int64,
    threshold: tl.int64, factor: tl.float64, alpha: tl.float64, beta: tl.float64,
    SPAN: tl.constexpr, VEC: tl.constexpr, SUBTRACT_MEAN: tl.constexpr, ADD_FIRST: tl.constexpr,
    SLOPE: tl.constexpr, PASSES: tl.constexpr, BLOCK_SPAN: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row a program, too long for its registers: its sums, then its tiles again, last one first, so that the second
    walk begins with what is still in the cache."""
    COMPUTE: tl.constexpr = tl.float64 if DY_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    sum_g, sum_g_x_hat = sum_row_gradients(
        DY_ptr, X_ptr, Residual_ptr, Bits_ptr, Weight_ptr, Bias_ptr, Mean_ptr, Rstd_ptr, row, 0,
        dy_stride, x_stride, residual_stride, alpha, beta, SPAN, VEC, SLOPE, PASSES, BLOCK_SPAN, TILES, STAGES, COMPUTE,
    )  # fmt: skip
    mean_g = sum_g[:, None] * (1.0 / SPAN) if SUBTRACT_MEAN else None
    mean_g_x_hat = sum_g_x_hat[:, None] * (1.0 / SPAN)

    for tile in tl.range(TILES, num_stages=STAGES):
        first = scalar(TILES - 1 - tile, tl.int64) * BLOCK_SPAN
        col, in_span, x_hat, rstd, g, dz = load_part_of_row(
            DY_ptr, X_ptr, Residual_ptr, Bits_ptr, Weight_ptr, Bias_ptr, Mean_ptr, Rstd_ptr, row, first,
            dy_stride, x_stride, residual_stride, alpha, beta, SPAN, VEC, SLOPE, PASSES, BLOCK_SPAN, COMPUTE,
        )  # fmt: skip
        dx = input_gradient(g, x_hat, rstd, mean_g, mean_g_x_hat)
        drops = row_factor(Seed_ptr, row, first, threshold, factor, SPAN, BLOCK_SPAN, COMPUTE)
        store_gradients(
            DX_ptr, DResidual_ptr, DTotal_ptr, dx, dz, row * SPAN, row * dtotal_stride * VEC, col, in_span, drops,
            ADD_FIRST, COMPUTE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["dy_stride", "x_stride", "residual_stride"])
def row_gradient_sums_kernel(
    DY_ptr, X_ptr, Residual_ptr, Bits_ptr, Weight_ptr, Bias_ptr, Mean_ptr, Rstd_ptr, GSums_ptr, GXHatSums_ptr,
    dy_stride: tl.int64, x_stride: tl.int64, residual_stride: tl.int64, alpha: tl.float64, beta: tl.float64,
    SPAN: tl.constexpr, VEC: tl.constexpr, SLOPE: tl.constexpr, PASSES: tl.constexpr,
    BLOCK_SPAN: tl.constexpr, STEPS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One chunk of one row a program: its sums of g and of g * x_hat, each [rows, CHUNKS]."""
    COMPUTE: tl.constexpr = tl.float64 if DY_ptr.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0).to(tl.int64)
    row = program // CHUNKS + tl.arange(0, 1)
    sum_g, sum_g_x_hat = sum_row_gradients(
        DY_ptr, X_ptr, Residual_ptr, Bits_ptr, Weight_ptr, Bias_ptr, Mean_ptr, Rstd_ptr, row, program % CHUNKS,
        dy_stride, x_stride, residual_stride, alpha, beta, SPAN, VEC, SLOPE, PASSES, BLOCK_SPAN, STEPS, 1, COMPUTE,
    )  # fmt: skip
    if GSums_ptr is not None:
        tl.store(GSums_ptr + program + tl.arange(0, 1), sum_g)
    tl.store(GXHatSums_ptr + program + tl.arange(0, 1), sum_g_x_hat)


@triton.jit
def load_row_mean(Sums_ptr, row, SPAN: tl.constexpr, CHUNKS: tl.constexpr, CHUNK_SLOTS: tl.constexpr):
    """The mean over a row, [1, 1], from the sums [rows, CHUNKS] over its chunks; None stays None."""
    if Sums_ptr is not None:
        index = tl.arange(0, CHUNK_SLOTS)[None, :]
        sums = tl.load(Sums_ptr + (row * CHUNKS)[:, None] + index, mask=index < CHUNKS, other=0.0)
        return tl.sum(sums, axis=1)[:, None] * (1.0 / SPAN)


@triton.jit(do_not_specialize=["rows", "dy_stride", "dtotal_stride", "x_stride", "residual_stride", "threshold"])
def row_gradient_apply_kernel(
    DY_ptr, DTotal_ptr, X_ptr, Residual_ptr, Bits_ptr, Weight_ptr, Bias_ptr, Mean_ptr, Rstd_ptr, Seed_ptr,
    GSums_ptr, GXHatSums_ptr, DX_ptr, DResidual_ptr, PartialDWeight_ptr, PartialDBias_ptr,
    rows: tl.int64, dy_stride: tl.int64, dtotal_stride: tl.int64, x_stride: tl.int64, residual_stride: tl.int64,
    threshold: tl.int64, factor: tl.float64, alpha: tl.float64, beta: tl.float64,
    SPAN: tl.constexpr, VEC: tl.constexpr, ADD_FIRST: tl.constexpr, SLOPE: tl.constexpr, PASSES: tl.constexpr,
    BLOCK_SPAN: tl.constexpr, CHUNKS: tl.constexpr, CHUNK_SLOTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One block of columns a program, down every stripes-th row; partial sums [stripes, SPAN]."""
    COMPUTE: tl.constexpr = tl.float64 if DY_ptr.dtype.element_ty == tl.float64 else tl.float32
    BLOCKS: tl.constexpr = (SPAN + BLOCK_SPAN - 1) // BLOCK_SPAN
    stripe = tl.program_id(0) // BLOCKS
    stripes = tl.num_programs(0) // BLOCKS
    first = (tl.program_id(0) % BLOCKS).to(tl.int64) * BLOCK_SPAN
    col = first + tl.arange(0, BLOCK_SPAN)[None, :]
    in_span = col < SPAN
    weight = load_columns(Weight_ptr, col, in_span, COMPUTE)
    bias = load_columns(Bias_ptr, col, in_span, COMPUTE)
    dweight = tl.zeros([1, BLOCK_SPAN], COMPUTE)
    dbias = tl.zeros([1, BLOCK_SPAN], COMPUTE)

    for index in tl.range(stripe, rows, stripes, num_stages=STAGES):
        row = scalar(index, tl.int64) + tl.arange(0, 1)
        x_hat, rstd, dz = load_row_gradients(
            DY_ptr, X_ptr, Residual_ptr, Bits_ptr, Mean_ptr, Rstd_ptr, weight, bias, row, row >= 0, first, col, in_span,
            dy_stride, x_stride, residual_stride, alpha, beta, SPAN, VEC, SLOPE, PASSES, COMPUTE,
        )  # fmt: skip
        if PartialDWeight_ptr is not None:
            dweight += dz * x_hat
        if PartialDBias_ptr is not None:
            dbias += dz
        dx = None
        if GXHatSums_ptr is not None:
            g = dz * weight if weight is not None else dz
            mean_g = load_row_mean(GSums_ptr, row, SPAN, CHUNKS, CHUNK_SLOTS)
            mean_g_x_hat = load_row_mean(GXHatSums_ptr, row, SPAN, CHUNKS, CHUNK_SLOTS)
            dx = input_gradient(g, x_hat, rstd, mean_g, mean_g_x_hat)
        drops = row_factor(Seed_ptr, row, first, threshold, factor, SPAN, BLOCK_SPAN, COMPUTE)
        store_gradients(
            DX_ptr, DResidual_ptr, DTotal_ptr, dx, dz, row * SPAN, row * dtotal_stride * VEC, col, in_span, drops,
            ADD_FIRST, COMPUTE,
        )  # fmt: skip

    store_column_sums(PartialDWeight_ptr, dweight, stripe, col, in_span, SPAN)
    store_column_sums(PartialDBias_ptr, dbias, stripe, col, in_span, SPAN)
