"""Tiles of activations in and out of registers, and what both families do with one: written once, for any layout.

A tile is [rows, columns]: its elements lie at base[:, None] + col, base [rows] and col [1, columns], or, to be read and
written by half warps, col `in_runs`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import pre_activation_gradient

HALF_WARP = tl.constexpr(16)


@triton.jit
def scalar(value, dtype: tl.constexpr):
    """A run-time number (a float arrives as float64, a loop counter as int32) in the type that is computed in."""
    return tl.full((), value, dtype)


@triton.jit
def in_runs(tile, RUN: tl.constexpr):
    """[rows, columns] as [columns // RUN, rows, RUN], whose runs half warps take side by side.

    Threads otherwise fill a row first. Where that is short each then has elements of many rows, every one with a sum,
    statistics and an address of its own.
    """
    return tl.permute(tl.reshape(tile, [tile.shape[0], tile.shape[1] // RUN, RUN]), (1, 0, 2))


@triton.jit
def columns_in_runs(col, RUN: tl.constexpr):
    """`in_runs` of neighbouring columns [1, columns], of which a thread takes a sixteenth of a run at a time; 0 leaves
    them as they are."""
    if RUN == 0:
        return col
    else:
        ACCESS: tl.constexpr = RUN // HALF_WARP
        runs = tl.permute(tl.reshape(col, [1, col.shape[1] // RUN, RUN]), (1, 0, 2))
        # The compiler does not see through a change of shape, nor a hint of what a function returns.
        return tl.multiple_of(tl.max_contiguous(runs, [1, 1, ACCESS]), [1, 1, ACCESS])


@triton.jit
def _mask_like(col, mask):
    """The mask [rows, columns] of a tile in the shape of its elements' addresses."""
    if len(col.shape) == 3:
        RUN: tl.constexpr = col.shape[2]
        runs = tl.permute(tl.reshape(mask, [mask.shape[0], mask.shape[1] // RUN, RUN]), (1, 0, 2))
        return tl.max_constancy(runs, [1, 1, RUN // HALF_WARP])
    else:
        return mask


@triton.jit
def _addresses(ptr, base, col):
    if len(col.shape) == 3:
        return ptr + (base[None, :, None] + col)
    else:
        return ptr + base[:, None] + col


@triton.jit
def load_tile(ptr, base, col, mask, COMPUTE: tl.constexpr):
    """A tile of activations, 0 outside the mask; None stays None. Cast before anything else looks at it."""
    if ptr is not None:
        tile = tl.load(_addresses(ptr, base, col), mask=_mask_like(col, mask), other=0.0)
        if len(col.shape) == 3:
            tile = tl.reshape(tl.permute(tile, (1, 0, 2)), mask.shape)
        return tile.to(COMPUTE)


@triton.jit
def store_tile(ptr, tile, base, col, mask):
    """Stores a tile in the type that is stored; nothing where there is nowhere to."""
    if ptr is not None:
        tile = tile.to(ptr.dtype.element_ty)
        if len(col.shape) == 3:
            tile = in_runs(tile, col.shape[2])
        tl.store(_addresses(ptr, base, col), tile, mask=_mask_like(col, mask))


@triton.jit
def load_input(
    X_ptr,
    Residual_ptr,
    Total_ptr,
    x_base,
    residual_base,
    col,
    mask,
    factor,
    COMPUTE: tl.constexpr,
):
    """What is normalized: x, or, where there is a total, x + residual as it is rounded there, x times the factor of
    dropout, if any."""
    x = load_tile(X_ptr, x_base, col, mask, COMPUTE)
    if Total_ptr is not None:
        if factor is not None:
            x = x * factor
        total = x + load_tile(Residual_ptr, residual_base, col, mask, COMPUTE)
        x = total.to(Total_ptr.dtype.element_ty).to(COMPUTE)
    return x


@triton.jit
def load_added_residual(Residual_ptr, Total_ptr, base, col, mask, COMPUTE: tl.constexpr):
    """The residual that is added after the norm, or None: there is none, or it is in the total already."""
    if Total_ptr is None:
        return load_tile(Residual_ptr, base, col, mask, COMPUTE)


@triton.jit
def load_gradients(
    DY_ptr, X_ptr, Residual_ptr, passes, mean, rstd, weight, bias, dy_base, x_base, residual_base, col, mask,
    alpha, beta, SLOPE: tl.constexpr, PASSES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """(x_hat, dz) of one tile, dz = dL/d(pre-activation), given mean (or None) and rstd, broadcastable to it.

    Without x, x_hat is nothing to use: None would not compile.
    """
    dy = load_tile(DY_ptr, dy_base, col, mask, COMPUTE)
    x_hat = load_tile(X_ptr, x_base, col, mask, COMPUTE)
    residual = load_tile(Residual_ptr, residual_base, col, mask, COMPUTE)
    if x_hat is not None:
        if mean is not None:
            x_hat = tl.where(mask, x_hat - mean, 0.0)
        x_hat = x_hat * rstd
    dz = pre_activation_gradient(
        dy, x_hat, weight, bias, residual, passes, SLOPE, PASSES, scalar(alpha, COMPUTE), scalar(beta, COMPUTE)
    )
    if x_hat is None:
        return dz, dz
    else:
        return x_hat, dz


@triton.jit
def store_gradients(
    DX_ptr, DResidual_ptr, DTotal_ptr, dx, dz, base, dtotal_base, col, mask, factor,
    ADD_FIRST: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """dx and dresidual of one tile. Where the residual was added first, both are the gradient of the total, dx times
    the factor of dropout, if any."""
    if ADD_FIRST:
        dtotal = load_tile(DTotal_ptr, dtotal_base, col, mask, COMPUTE)
        if dtotal is not None:
            dx = dx + dtotal
        dresidual = dx
        if factor is not None and dx is not None:
            dx = dx * factor
    else:
        dresidual = dz
    store_tile(DX_ptr, dx, base, col, mask)
    store_tile(DResidual_ptr, dresidual, base, col, mask)
