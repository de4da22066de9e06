"""What follows x_hat in every norm, and its gradient: affine, residual, activation. Both kernel families use it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pre_activation(x_hat, weight, bias, residual):
    """z = x_hat * weight + bias + residual; each of the last three may be None."""
    z = x_hat
    if weight is not None:
        z = z * weight
    if bias is not None:
        z = z + bias
    if residual is not None:
        z = z + residual
    return z


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, alpha, beta):
    """The activation's value, or z itself where ACTIVATION is None."""
    if ACTIVATION is not None:
        return ACTIVATION(z, alpha, beta)
    else:
        return z


@triton.jit
def pre_activation_gradient(
    dy, x_hat, weight, bias, residual, passes, SLOPE: tl.constexpr, PASSES: tl.constexpr, alpha, beta
):
    """dz = dy * slope; z is computed again unless there is no activation or its slope is in the bit mask `passes`."""
    if SLOPE is not None:
        return dy * SLOPE(pre_activation(x_hat, weight, bias, residual), alpha, beta)
    elif PASSES is not None:
        if passes is None:
            passes = PASSES(pre_activation(x_hat, weight, bias, residual))
        # A zero slope blocks an infinite or NaN dy as well, as torch's relu does.
        return tl.where(passes, dy, tl.where(alpha == 0, 0.0, dy * alpha))
    else:
        return dy


@triton.jit
def _bit_bytes(row, first_byte, in_rows, row_bytes, end_byte, BYTES: tl.constexpr):
    """Offsets [rows, BYTES] of the bytes from `first_byte` on, eight flags each, and which of them exist."""
    byte = first_byte + tl.arange(0, BYTES)[None, :]
    end = row_bytes if end_byte is None else tl.minimum(row_bytes, end_byte)
    return (row * row_bytes)[:, None] + byte, in_rows[:, None] & (byte < end)


@triton.jit
def pack(flags):
    """[rows, span] flags, eight to a byte, lowest bit first: [rows, span // 8]. Or words of a flag a byte to words."""
    flags = tl.reshape(flags, [flags.shape[0], flags.shape[1] // 8, 8]).to(tl.uint32)
    return tl.sum(flags << tl.arange(0, 8).to(tl.uint32)[None, None, :], axis=2)


@triton.jit
def store_bytes(Bits_ptr, packed, row, first_byte, in_rows, row_bytes, end_byte=None):
    """Stores bytes [rows, BYTES] into each row's from `first_byte` on, up to `end_byte` where another program's begin
    there."""
    offsets, exists = _bit_bytes(row, first_byte, in_rows, row_bytes, end_byte, packed.shape[1])
    tl.store(Bits_ptr + offsets, packed.to(tl.uint8), mask=exists)


@triton.jit
def store_bits(Bits_ptr, flags, row, first_byte, in_rows, row_bytes):
    """Packs flags [rows, span] into each row's bytes from `first_byte` on."""
    store_bytes(Bits_ptr, pack(flags), row, first_byte, in_rows, row_bytes)


@triton.jit
def load_bits(Bits_ptr, row, first_byte, in_rows, row_bytes, BLOCK_SPAN: tl.constexpr):
    """The flags [rows, BLOCK_SPAN] that `store_bits` packed, or None where there is no mask."""
    if Bits_ptr is not None:
        ROWS: tl.constexpr = row.shape[0]
        offsets, exists = _bit_bytes(row, first_byte, in_rows, row_bytes, None, BLOCK_SPAN // 8)
        packed = tl.load(Bits_ptr + offsets, mask=exists, other=0).to(tl.int32)
        bits = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        return tl.reshape(bits, [ROWS, BLOCK_SPAN]) != 0
