"""Tiles of activations in and out of registers, and what both families do with one: written once, for any layout.

A tile is [rows, columns]: its elements lie at base[:, None] + col, base [rows] and col [1, columns].
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
def load_tile(ptr, base, col, mask, COMPUTE: tl.constexpr):
    """A tile of activations, 0 outside the mask; None stays None. Cast before anything else looks at it."""
    if ptr is not None:
        return tl.load(ptr + base[:, None] + col, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def store_tile(ptr, tile, base, col, mask):
    """Stores a tile in the type that is stored; nothing where there is nowhere to."""
    if ptr is not None:
        tl.store(ptr + base[:, None] + col, tile.to(ptr.dtype.element_ty), mask=mask)


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
