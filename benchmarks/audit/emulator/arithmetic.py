"""All that is computed in a thread from its own registers, by opcode."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from .conversions import comparison, conversion, move, selection
from .floats import float_operation
from .formats import FLOATS
from .integers import integer_operation
from .operation import Operation, packed

OF_ANY_TYPE: Mapping[str, Callable[[tuple[str, ...], int], Operation | None]] = {
    "cvt": conversion,
    "cvta": move,
    "mov": move,
    "selp": selection,
    "setp": comparison,
}
# Types of two values, and of the register that holds them.
PACKED: Mapping[str, tuple[str, str]] = {
    "f32x2": ("f32", "b64"),
    "f16x2": ("f16", "b32"),
    "bf16x2": ("bf16", "b32"),
    "u16x2": ("u16", "b32"),
    "s16x2": ("s16", "b32"),
}


@functools.cache
def operation(opcode: str, count: int) -> Operation | None:
    """What it computes of so many operands; None where that is not known."""
    *parts, ptx_type = opcode.split(".")
    if build := OF_ANY_TYPE.get(parts[0] if parts else ""):
        return build((*parts, ptx_type), count)
    if ptx_type in PACKED:
        element, register = PACKED[ptx_type]
        of_element = operation(".".join((*parts, element)), count)
        return packed(of_element, register) if of_element else None
    if not parts:
        return None
    return (float_operation if ptx_type in FLOATS else integer_operation)((*parts, ptx_type), count)
