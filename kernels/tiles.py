"""Tiles of activations in and out of registers, and what both families do with one: written once, for any layout.

A tile is [rows, columns]: its elements lie at base[:, None] + col, base [rows] and col [1, columns]. Rows that are
short, follow one another without gaps and begin between 16-byte boundaries are moved together instead, as the one run
of RUN elements that they are: base is then where it begins, col [rows, columns] the place of each element in it, and
slot [power of two above RUN] the reverse, the place in the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import pre_activation_gradient


@triton.jit
def scalar(value, dtype: tl.constexpr):
    """A run-time number (a float arrives as float64, a loop counter as int32) in the type that is computed in."""
    return tl.full((), value, dtype)


@triton.jit
def load_tile(ptr, base, col, mask, COMPUTE: tl.constexpr, slot=None, RUN: tl.constexpr = 0):
    """A tile of activations, 0 outside the mask; None stays None. Cast before anything else looks at it."""
    if ptr is not None:
        if RUN == 0:
            return tl.load(ptr + base[:, None] + col, mask=mask, other=0.0).to(COMPUTE)
        else:
            element = tl.arange(0, slot.shape[0])
            run = tl.load(ptr + base + element, mask=element < RUN, other=0.0)
            tile = tl.gather(run, tl.reshape(col, [col.shape[0] * col.shape[1]]), 0)
            return tl.where(mask, tl.reshape(tile, col.shape).to(COMPUTE), 0.0)


@triton.jit
def store_tile(ptr, tile, base, col, mask, slot=None, RUN: tl.constexpr = 0):
    """Stores a tile in the type that is stored; nothing where there is nowhere to."""
    if ptr is not None:
        values = tile.to(ptr.dtype.element_ty)
        if RUN == 0:
            tl.store(ptr + base[:, None] + col, values, mask=mask)
        else:
            element = tl.arange(0, slot.shape[0])
            run = tl.gather(tl.reshape(values, [tile.shape[0] * tile.shape[1]]), slot, 0)
            tl.store(ptr + base + element, run, mask=element < RUN)


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
    slot=None,
    RUN: tl.constexpr = 0,
):
    """What is normalized: x, or, where there is a total, x + residual as it is rounded there, x times the factor of
    dropout, if any."""
    x = load_tile(X_ptr, x_base, col, mask, COMPUTE, slot, RUN)
    if Total_ptr is not None:
        if factor is not None:
            x = x * factor
        total = x + load_tile(Residual_ptr, residual_base, col, mask, COMPUTE, slot, RUN)
        x = total.to(Total_ptr.dtype.element_ty).to(COMPUTE)
    return x


@triton.jit
def load_added_residual(
    Residual_ptr, Total_ptr, base, col, mask, COMPUTE: tl.constexpr, slot=None, RUN: tl.constexpr = 0
):
    """The residual that is added after the norm, or None: there is none, or it is in the total already."""
    if Total_ptr is None:
        return load_tile(Residual_ptr, base, col, mask, COMPUTE, slot, RUN)


@triton.jit
def load_gradients(
    DY_ptr, X_ptr, Residual_ptr, passes, mean, rstd, weight, bias, dy_base, x_base, residual_base, col, mask,
    alpha, beta, SLOPE: tl.constexpr, PASSES: tl.constexpr, COMPUTE: tl.constexpr, slot=None, RUN: tl.constexpr = 0,
):  # fmt: skip
    """(x_hat, dz) of one tile, dz = dL/d(pre-activation), given mean (or None) and rstd, broadcastable to it.

    Without x, x_hat is nothing to use: None would not compile.
    """
    dy = load_tile(DY_ptr, dy_base, col, mask, COMPUTE, slot, RUN)
    x_hat = load_tile(X_ptr, x_base, col, mask, COMPUTE, slot, RUN)
    residual = load_tile(Residual_ptr, residual_base, col, mask, COMPUTE, slot, RUN)
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
    ADD_FIRST: tl.constexpr, COMPUTE: tl.constexpr, slot=None, RUN: tl.constexpr = 0,
):  # fmt: skip
    """dx and dresidual of one tile. Where the residual was added first, both are the gradient of the total, dx times
    the factor of dropout, if any."""
    if ADD_FIRST:
        dtotal = load_tile(DTotal_ptr, dtotal_base, col, mask, COMPUTE, slot, RUN)
        if dtotal is not None:
            dx = dx + dtotal
        dresidual = dx
        if factor is not None and dx is not None:
            dx = dx * factor
    else:
        dresidual = dz
    store_tile(DX_ptr, dx, base, col, mask, slot, RUN)
    store_tile(DResidual_ptr, dresidual, base, col, mask, slot, RUN)
