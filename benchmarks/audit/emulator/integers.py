"""Integer and bit instructions. Registers wrap around, as NumPy's arrays do."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from .formats import BITS, COMPUTED_AS, INTEGERS, UNSIGNED, Array
from .operation import Operation

ARITHMETIC: Mapping[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "abs": np.abs,
    "neg": np.negative,
    "div": lambda a, b: _quotient(a, b),
    "rem": lambda a, b: a - _quotient(a, b) * b,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}
BOOLEAN = frozenset({"and", "or", "xor", "not"})  # of which there are forms for predicates


def _quotient(a: Array, b: Array) -> Array:
    """Rounded towards zero; by zero, of which PTX says nothing, a itself."""
    b = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return a // b
    return np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)


def integer_operation(parts: tuple[str, ...], count: int) -> Operation | None:
    """Of `add.s32`, so many operands; None where there is no such instruction."""
    name, *modifiers, ptx_type = parts
    if build := _BUILT.get(name):
        return build(modifiers, ptx_type)
    known = name in ARITHMETIC and (ptx_type in INTEGERS or (ptx_type == "pred" and name in BOOLEAN))
    return Operation((ptx_type,) * count, ARITHMETIC[name], ptx_type) if known and not modifiers else None


def _product(modifiers: list[str], ptx_type: str) -> Operation | None:
    """mul.lo, mul.hi, mul.wide: of twice the bits, which are there."""
    if ptx_type not in INTEGERS or len(modifiers) != 1 or modifiers[0] not in _HALVES:
        return None
    return _HALVES[modifiers[0]](ptx_type)


def _product_and_sum(modifiers: list[str], ptx_type: str) -> Operation | None:
    product = _product(modifiers, ptx_type)
    if product is None:
        return None
    multiply = product.compute
    return Operation((*product.sources, product.result), lambda a, b, c: multiply(a, b) + c, product.result)


def _low_half(ptx_type: str) -> Operation:
    return Operation((ptx_type, ptx_type), np.multiply, ptx_type)


def _twice_as_wide(ptx_type: str) -> Operation:
    wide = f"{ptx_type[0]}{2 * BITS[ptx_type]}"
    as_wide = INTEGERS[wide]
    return Operation((ptx_type, ptx_type), lambda a, b: a.astype(as_wide) * b.astype(as_wide), wide)


def _high_half(ptx_type: str) -> Operation:
    bits, kind = BITS[ptx_type], INTEGERS[ptx_type]
    if bits == 64:  # NumPy has no wider ones, Python has
        high = np.frompyfunc(lambda a, b: int(a) * int(b) >> 64, 2, 1)
        return Operation((ptx_type, ptx_type), lambda a, b: high(a, b).astype(kind), ptx_type)
    wide = INTEGERS[f"{ptx_type[0]}{2 * bits}"]
    return Operation(
        (ptx_type, ptx_type), lambda a, b: (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(kind), ptx_type
    )


_HALVES: Mapping[str, Callable[[str], Operation]] = {"lo": _low_half, "wide": _twice_as_wide, "hi": _high_half}


def _shift_left(modifiers: list[str], ptx_type: str) -> Operation:
    bits = BITS[ptx_type]

    def compute(a: Array, distance: Array) -> Array:
        return np.where(distance < bits, a << np.minimum(distance, bits - 1).astype(a.dtype), a.dtype.type(0))

    return Operation((ptx_type, "u32"), compute, ptx_type)


def _shift_right(modifiers: list[str], ptx_type: str) -> Operation:
    """From its end on, a shift leaves the sign, or nothing."""
    bits = BITS[ptx_type]

    def compute(a: Array, distance: Array) -> Array:
        beyond = a >> a.dtype.type(bits - 1) if a.dtype.kind == "i" else a.dtype.type(0)
        return np.where(distance < bits, a >> np.minimum(distance, bits - 1).astype(a.dtype), beyond)

    return Operation((ptx_type, "u32"), compute, ptx_type)


def _funnel_shift(modifiers: list[str], ptx_type: str) -> Operation | None:
    """shf: 32 of 64 bits, of which b has the upper ones."""
    direction, mode = modifiers

    def compute(a: Array, b: Array, distance: Array) -> Array:
        both = b.astype(np.uint64) << np.uint64(32) | a
        distance = (distance & 31 if mode == "wrap" else np.minimum(distance, 32)).astype(np.uint64)
        return (both << distance >> np.uint64(32) if direction == "l" else both >> distance).astype(np.uint32)

    return Operation(("u32", "u32", "u32"), compute, "u32")


def _bit_field_extract(modifiers: list[str], ptx_type: str) -> Operation:
    kind, unsigned = INTEGERS[ptx_type], UNSIGNED[BITS[ptx_type]]

    def compute(a: Array, position: Array, length: Array) -> Array:
        position, length = (each.astype(np.uint64) & np.uint64(255) for each in (position, length))
        below = (np.uint64(1) << length) - np.uint64(1)
        field = a.view(unsigned).astype(np.uint64) >> position & below
        if ptx_type.startswith("s"):
            sign = field >> np.maximum(length, np.uint64(1)) - np.uint64(1) & np.uint64(1)
            field = np.where(sign.astype(bool), field | ~below, field)
        return field.astype(unsigned).view(kind)

    return Operation((ptx_type, "u32", "u32"), compute, ptx_type)


def _bit_field_insert(modifiers: list[str], ptx_type: str) -> Operation | None:
    def compute(field: Array, into: Array, position: Array, length: Array) -> Array:
        field, into, position, length = (each.astype(np.uint64) for each in (field, into, position, length))
        place = ((np.uint64(1) << length) - np.uint64(1)) << position
        return ((into & ~place) | (field << position & place)).astype(np.uint32)

    return Operation(("u32",) * 4, compute, "u32") if ptx_type == "b32" else None


def _permute_bytes(modifiers: list[str], ptx_type: str) -> Operation | None:
    """prmt: each nibble of the selector names one of eight bytes, or with its upper bit that byte's sign."""

    def compute(a: Array, b: Array, selector: Array) -> Array:
        a, b, selector = np.broadcast_arrays(a, b, selector)
        choices = np.stack([source >> np.uint32(8 * byte) & np.uint32(255) for source in (a, b) for byte in range(4)])
        result = np.zeros_like(a)
        for byte in range(4):
            choice = selector >> np.uint32(4 * byte) & np.uint32(15)
            value = np.take_along_axis(choices, (choice & 7).astype(np.int64)[None], 0)[0]
            sign = np.where(value & 128, np.uint32(255), np.uint32(0))
            result |= np.where(choice & 8, sign, value) << np.uint32(8 * byte)
        return result

    return Operation(("u32",) * 3, compute, "u32") if not modifiers else None


def _any_logic(modifiers: list[str], ptx_type: str) -> Operation | None:
    """lop3: a table of eight bits says what of three bits is set."""

    def compute(a: Array, b: Array, c: Array, table: Array) -> Array:
        result = a & b & c & np.uint32(0)
        for case in range(8):
            if int(table[0]) >> case & 1:
                result |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
        return result

    return Operation(("u32",) * 4, compute, "u32") if not modifiers else None


def _count_of_bits(modifiers: list[str], ptx_type: str) -> Operation | None:
    def compute(a: Array) -> Array:
        return np.unpackbits(a[:, None].view(np.uint8), axis=1).sum(1, dtype=COMPUTED_AS["u32"])

    return Operation((ptx_type,), compute, "u32")


_BUILT: Mapping[str, Callable[[list[str], str], Operation | None]] = {
    "mul": _product,
    "mad": _product_and_sum,
    "shl": _shift_left,
    "shr": _shift_right,
    "shf": _funnel_shift,
    "bfe": _bit_field_extract,
    "bfi": _bit_field_insert,
    "prmt": _permute_bytes,
    "lop3": _any_logic,
    "popc": _count_of_bits,
}
