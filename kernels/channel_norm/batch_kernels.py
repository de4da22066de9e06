"""Batch norm of channels that fit on chip: each is read once.

x is a matrix [rows, COLUMNS] (see `views.pooled_planes`), each channel SPREAD = COLUMNS // CHANNELS neighbouring
columns of it. A program holds all rows of the columns of BLOCK_CHANNELS channels, in a tile in which each channel has
a power of two of columns: what is summed over a channel is then a group of neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..dropout import plane_factor
from ..epilogue import activate, pack, pre_activation, store_bytes
from ..moments import input_gradient, reciprocal_deviation, sum_in_groups, tile_moments
from ..tiles import load_added_residual, load_gradients, load_input, scalar, store_gradients, store_tile
from .forward_kernels import load_running, move_statistic
from .planes import load_of_channels


@triton.jit
def columns_of_program(
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """(column, in_columns, channel, is_first), each [BLOCK_COLUMNS]; is_first: of its channel."""
    SPREAD: tl.constexpr = COLUMNS // CHANNELS
    PADDED: tl.constexpr = BLOCK_COLUMNS // BLOCK_CHANNELS
    index = tl.arange(0, BLOCK_COLUMNS)
    channel = tl.program_id(0).to(tl.int64) * BLOCK_CHANNELS + index // PADDED
    in_columns = (index % PADDED < SPREAD) & (channel < CHANNELS)
    return channel * SPREAD + index % PADDED, in_columns, channel, in_columns & (index % PADDED == 0)


@triton.jit
def rows_of_program(rows, BLOCK_ROWS: tl.constexpr, FULL: tl.constexpr):
    """(row, in_rows), each [BLOCK_ROWS]. Where the tile is FULL, in_rows is constant: what was found of each row's
    bounds would stay in registers."""
    row = tl.arange(0, BLOCK_ROWS).to(tl.int64)
    if FULL:
        return row, tl.full([BLOCK_ROWS], True, tl.int1)
    else:
        return row, row < rows


@triton.jit
def store_first(ptr, values, channel, is_first):
    """A value of each channel, in the type that is stored; nothing where there is nowhere to."""
    if ptr is not None:
        tl.store(ptr + channel, values.to(ptr.dtype.element_ty), mask=is_first)


@triton.jit
def close_gaps(words, SPREAD: tl.constexpr, PADDED: tl.constexpr):
    """[rows, bytes] of flags, SPREAD of each channel that begin PADDED apart, as bytes without gaps. A word has one
    byte each of as many rows as `store_column_bits` puts together, which is then looked for once."""
    BYTES: tl.constexpr = words.shape[1]
    EACH_ROW: tl.constexpr = 0x01010101
    byte = tl.arange(0, BYTES)[None, :]
    place = byte * 8
    closed = tl.zeros_like(words)
    # A byte has parts of so many others: up to the end of one, to the channel's end, and of the channels after it.
    for _ in tl.static_range(3 if SPREAD > 4 else 4):
        slot = place // SPREAD * PADDED + place % SPREAD
        flags = tl.minimum(8 - slot % 8, SPREAD - place % SPREAD)
        down, up = (slot % 8).to(tl.uint32), (place - byte * 8).to(tl.uint32)
        part = tl.gather(words, tl.broadcast_to(tl.minimum(slot // 8, BYTES - 1), words.shape), 1)
        keep = (((1 << flags) - 1).to(tl.uint32) << up & 255) * EACH_ROW
        closed |= (part >> down << up) & keep
        place += flags
    return closed


@triton.jit
def store_column_bits(
    Bits_ptr, flags, row, in_rows, COLUMNS: tl.constexpr, SPREAD: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """Packs the flags [rows, columns] of this program along the columns that exist."""
    PADDED: tl.constexpr = flags.shape[1] // BLOCK_CHANNELS
    ROW_BYTES: tl.constexpr = (COLUMNS + 7) // 8
    OWNED_BYTES: tl.constexpr = BLOCK_CHANNELS * SPREAD // 8
    first = tl.program_id(0).to(tl.int64) * OWNED_BYTES
    if PADDED == SPREAD:
        packed = pack(flags)
    else:
        # To gather flags one by one would take more instructions than all else that is done to an element.
        TOGETHER: tl.constexpr = min(4, flags.shape[0])
        of_row = tl.arange(0, TOGETHER).to(tl.uint32) * 8
        words = tl.reshape(flags.to(tl.uint32), [flags.shape[0] // TOGETHER, TOGETHER, flags.shape[1]])
        words = close_gaps(pack(tl.sum(words << of_row[None, :, None], axis=1)), SPREAD, PADDED)
        packed = tl.reshape(words[:, None, :] >> of_row[None, :, None], [flags.shape[0], words.shape[1]])
    store_bytes(Bits_ptr, packed, row, first, in_rows, ROW_BYTES, first + OWNED_BYTES)


@triton.jit
def load_column_bits(Bits_ptr, row, column, mask, COLUMNS: tl.constexpr):
    """The flags of a tile that `store_column_bits` packed, or None where there is no mask."""
    if Bits_ptr is not None:
        byte = tl.load(Bits_ptr + row[:, None] * ((COLUMNS + 7) // 8) + column[None, :] // 8, mask=mask, other=0)
        return (byte.to(tl.int32) >> (column % 8).to(tl.int32)[None, :]) & 1 != 0


@triton.jit(do_not_specialize=["rows", "threshold", "positions"])
def batch_norm_forward_kernel(
    X_ptr, Residual_ptr, Weight_ptr, Bias_ptr, Seed_ptr, RunningMean_ptr, RunningVar_ptr,
    Y_ptr, Total_ptr, Bits_ptr, Mean_ptr, Rstd_ptr,
    rows: tl.int64, momentum: tl.float64, threshold: tl.int64, positions: tl.int64, factor: tl.float64, 
    eps: tl.float64, alpha: tl.float64, beta: tl.float64,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, ACTIVATION: tl.constexpr, PASSES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """y and what else there is a pointer for; running statistics are moved."""
    COMPUTE: tl.constexpr = tl.float64 if X_ptr.dtype.element_ty == tl.float64 else tl.float32
    SPREAD: tl.constexpr = COLUMNS // CHANNELS
    column, in_columns, channel, is_first = columns_of_program(COLUMNS, CHANNELS, BLOCK_CHANNELS, BLOCK_COLUMNS)
    row, in_rows = rows_of_program(rows, BLOCK_ROWS, FULL)
    base, col = row * COLUMNS, column[None, :]
    mask = in_rows[:, None] & in_columns[None, :]

    drops = plane_factor(
        Seed_ptr, 0, column[None, :], row[:, None], rows, positions, threshold, factor, COLUMNS, COMPUTE
    )
    x = load_input(X_ptr, Residual_ptr, Total_ptr, base, base, col, mask, drops, COMPUTE)
    store_tile(Total_ptr, x, base, col, mask)
    # Everything that will be needed is asked for before the reduction waits for x.
    weight = load_of_channels(Weight_ptr, channel, in_columns, COMPUTE, 0)
    bias = load_of_channels(Bias_ptr, channel, in_columns, COMPUTE, 0)
    running_mean = load_running(RunningMean_ptr, channel, is_first, COMPUTE)
    running_var = load_running(RunningVar_ptr, channel, is_first, COMPUTE)
    residual = None
    if FULL:
        residual = load_added_residual(Residual_ptr, Total_ptr, base, col, mask, COMPUTE)

    count = scalar(rows * SPREAD, COMPUTE)
    mean, m2, deviation = tile_moments(x, mask, 1.0 / count, True, BLOCK_COLUMNS // BLOCK_CHANNELS, 0)
    rstd = reciprocal_deviation(m2, count, scalar(eps, COMPUTE))
    if not FULL:  # masks take the registers in which it would wait
        residual = load_added_residual(Residual_ptr, Total_ptr, base, col, mask, COMPUTE)
    z = pre_activation(deviation * rstd[None, :], weight, bias, residual)
    y = activate(z, ACTIVATION, scalar(alpha, COMPUTE), scalar(beta, COMPUTE))
    store_tile(Y_ptr, y, base, col, mask)
    if Mean_ptr is not None:
        tl.store(Mean_ptr + channel, mean, mask=is_first)
        tl.store(Rstd_ptr + channel, rstd, mask=is_first)
    move_statistic(RunningMean_ptr, running_mean, mean, channel, is_first, scalar(momentum, COMPUTE))
    move_statistic(RunningVar_ptr, running_var, m2 / (count - 1.0), channel, is_first, scalar(momentum, COMPUTE))
    if Bits_ptr is not None:
        store_column_bits(Bits_ptr, PASSES(z), row, in_rows, COLUMNS, SPREAD, BLOCK_CHANNELS)


@triton.jit(do_not_specialize=["rows", "threshold", "positions"])
def batch_norm_backward_kernel(
    DY_ptr, DTotal_ptr, X_ptr, Residual_ptr, Bits_ptr, Weight_ptr, Bias_ptr, Mean_ptr, Rstd_ptr, Seed_ptr,
    DX_ptr, DResidual_ptr, DWeight_ptr, DBias_ptr, rows: tl.int64,
    threshold: tl.int64, positions: tl.int64, factor: tl.float64, alpha: tl.float64, beta: tl.float64,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, ADD_FIRST: tl.constexpr, NEEDS_DX: tl.constexpr,
    SLOPE: tl.constexpr, PASSES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The gradients that there are pointers for."""
    COMPUTE: tl.constexpr = tl.float64 if DY_ptr.dtype.element_ty == tl.float64 else tl.float32
    SPREAD: tl.constexpr = COLUMNS // CHANNELS
    column, in_columns, channel, is_first = columns_of_program(COLUMNS, CHANNELS, BLOCK_CHANNELS, BLOCK_COLUMNS)
    row, in_rows = rows_of_program(rows, BLOCK_ROWS, FULL)
    base, col = row * COLUMNS, column[None, :]
    mask = in_rows[:, None] & in_columns[None, :]

    mean = load_of_channels(Mean_ptr, channel, in_columns, COMPUTE, 0)
    rstd = load_of_channels(Rstd_ptr, channel, in_columns, COMPUTE, 0)
    weight = load_of_channels(Weight_ptr, channel, in_columns, COMPUTE, 0)
    bias = load_of_channels(Bias_ptr, channel, in_columns, COMPUTE, 0)
    passes = load_column_bits(Bits_ptr, row, column, mask, COLUMNS)
    x_hat, dz = load_gradients(
        DY_ptr, X_ptr, Residual_ptr, passes, mean, rstd, weight, bias, base, base, base, col, mask, alpha, beta,
        SLOPE, PASSES, COMPUTE,
    )  # fmt: skip
    PADDED: tl.constexpr = BLOCK_COLUMNS // BLOCK_CHANNELS
    sum_dz = sum_in_groups(tl.sum(dz, axis=0), PADDED)
    store_first(DBias_ptr, sum_dz, channel, is_first)
    dx = None
    if X_ptr is not None:
        sum_dz_x_hat = sum_in_groups(tl.sum(dz * x_hat, axis=0), PADDED)
        store_first(DWeight_ptr, sum_dz_x_hat, channel, is_first)
        if NEEDS_DX:
            inv_count = 1.0 / scalar(rows * SPREAD, COMPUTE)
            mean_g, mean_g_x_hat = sum_dz[None, :] * inv_count, sum_dz_x_hat[None, :] * inv_count
            g = dz
            if weight is not None:
                g, mean_g, mean_g_x_hat = g * weight, mean_g * weight, mean_g_x_hat * weight
            dx = input_gradient(g, x_hat, rstd, mean_g, mean_g_x_hat)
    drops = plane_factor(
        Seed_ptr, 0, column[None, :], row[:, None], rows, positions, threshold, factor, COLUMNS, COMPUTE
    )
    store_gradients(DX_ptr, DResidual_ptr, DTotal_ptr, dx, dz, base, base, col, mask, drops, ADD_FIRST, COMPUTE)
