"""The types of PTX as NumPy has them. Registers are kept as bits: unsigned integers, and booleans for predicates.

bfloat16, which NumPy lacks, is computed with as float32 and rounded when it is put into a register.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from .ptx import PREDICATE_BITS, UnknownInstruction

Array = npt.NDArray

UNSIGNED: Mapping[int, type] = {PREDICATE_BITS: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: Mapping[int, type] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS: Mapping[str, type] = {"f16": np.float16, "bf16": np.float32, "f32": np.float32, "f64": np.float64}
INTEGERS: Mapping[str, type] = {
    f"{kind}{bits}": (SIGNED if kind == "s" else UNSIGNED)[bits] for kind in "bus" for bits in SIGNED
}
COMPUTED_AS: Mapping[str, type] = {**FLOATS, **INTEGERS, "pred": np.bool_}
BITS: Mapping[str, int] = {
    **{name: np.dtype(kind).itemsize * 8 for name, kind in COMPUTED_AS.items()},
    "bf16": 16,
    "pred": PREDICATE_BITS,
}

BFLOAT16_NAN = np.uint16(0x7FFF)
UNDEFINED = 0x5A5A5A5A5A5A5A5A  # in registers that nothing wrote: as a number, large and odd


def decode(bits: Array, ptx_type: str) -> Array:
    """What a register holds, read as a type that is not wider."""
    if ptx_type == "pred":
        return bits
    unsigned = UNSIGNED[BITS[ptx_type]]
    if bits.dtype != unsigned:
        bits = bits.astype(unsigned)
    if ptx_type == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(COMPUTED_AS[ptx_type])


def encode(values: Array, ptx_type: str) -> Array:
    """The bits of results; what was computed wider is rounded to nearest even."""
    if ptx_type == "bf16":
        return _bfloat16(values.astype(np.float32))
    if ptx_type == "pred":
        return values
    return np.ascontiguousarray(values, COMPUTED_AS[ptx_type]).view(UNSIGNED[BITS[ptx_type]])


def extended(bits: Array, ptx_type: str, width: int) -> Array:
    """Bits of a type as a register of `width` holds them, signed ones with their sign."""
    if bits.dtype == UNSIGNED[width]:
        return bits
    if ptx_type.startswith("s") and BITS[ptx_type] < width:
        return bits.view(SIGNED[BITS[ptx_type]]).astype(SIGNED[width]).view(UNSIGNED[width])
    return bits.astype(UNSIGNED[width])


def split(bits: Array, parts: int) -> list[Array]:
    """The parts of registers that hold several values, lowest bits first."""
    width = bits.dtype.itemsize * 8 // parts
    return [(bits >> bits.dtype.type(width * part)).astype(UNSIGNED[width]) for part in range(parts)]


def join(parts: list[Array]) -> Array:
    """The opposite."""
    width = parts[0].dtype.itemsize * 8
    whole = UNSIGNED[width * len(parts)]
    shifted = (bits.astype(whole) << whole(width * part) for part, bits in enumerate(parts))
    return functools.reduce(np.bitwise_or, shifted)


def flushed(values: Array) -> Array:
    """Floats whose subnormals are zeros of their sign, as .ftz has operands and results."""
    subnormal = np.abs(values) < np.finfo(values.dtype).smallest_normal
    return np.where(subnormal, np.copysign(values.dtype.type(0), values), values)


@functools.cache
def constant(text: str, bits: int) -> Array:
    """An immediate operand as the bits of a register: one element, which NumPy broadcasts."""
    if text[:2].lower() in ("0f", "0d"):
        return np.full(1, int(text[2:], 16), UNSIGNED[32 if text[1] in "fF" else 64])
    try:
        value = int(text == "true") if text in ("true", "false") else int(text.rstrip("U"), 0)
    except ValueError:
        raise UnknownInstruction(f"operand {text}") from None
    return np.full(1, value & ((1 << bits) - 1), UNSIGNED[bits])


@functools.cache
def undefined(bits: int) -> Array:
    """A register that nothing wrote."""
    return np.full(1, 0 if bits == PREDICATE_BITS else UNDEFINED & ((1 << bits) - 1), UNSIGNED[bits])


def _bfloat16(values: Array) -> Array:
    bits = np.ascontiguousarray(values).view(np.uint32)
    to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(values), BFLOAT16_NAN, ((bits + to_even) >> np.uint32(16)).astype(np.uint16))
