"""Floating-point instructions.

As PTX defines them: a multiply-add is rounded once, but by way of float64, so that of some 2**29 of float32 one is
rounded twice; .ftz takes subnormals for zero. What PTX only approximates (rsqrt, ex2, ...) is rounded from float64, and
better than any GPU has it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np

from .formats import FLOATS, Array, flushed
from .operation import Operation

WIDER: Mapping[type, type] = {np.float16: np.float64, np.float32: np.float64, np.float64: np.longdouble}


def _multiply_add(a: Array, b: Array, c: Array) -> Array:
    wide = WIDER[np.result_type(a, b, c).type]
    return a.astype(wide) * b.astype(wide) + c.astype(wide)


def _approximated(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda a: function(a.astype(np.float64))


def _folded(function: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    """Of two operands or, on sm_100, of three."""
    return lambda *operands: functools.reduce(function, operands)


ARITHMETIC: Mapping[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "fma": _multiply_add,
    "min": _folded(np.fmin),
    "max": _folded(np.fmax),
    "abs": np.abs,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "copysign": lambda sign, magnitude: np.copysign(magnitude, sign),
    "rsqrt": _approximated(lambda a: 1 / np.sqrt(a)),
    "rcp": _approximated(lambda a: 1 / a),
    "ex2": _approximated(np.exp2),
    "lg2": _approximated(np.log2),
    "tanh": _approximated(np.tanh),
}
HANDS_NAN_ON: Mapping[str, Callable[..., Array]] = {"min": _folded(np.minimum), "max": _folded(np.maximum)}
CLASSES: Mapping[str, Callable[[Array], Array]] = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "notanumber": np.isnan,
}
MODIFIERS = frozenset({"rn", "ftz", "approx", "full", "NaN"})


def float_operation(parts: tuple[str, ...], count: int) -> Operation | None:
    """Of `fma.rn.ftz.f32`, so many operands; None where there is no such instruction."""
    name, *modifiers, ptx_type = parts
    if name == "testp":
        return Operation((ptx_type,), CLASSES[modifiers[0]], "pred") if modifiers[0] in CLASSES else None
    sources, result = (ptx_type,) * count, ptx_type
    if "f32" in modifiers and name in ("add", "sub", "fma"):  # add.f32.bf16: what is added to is float32
        modifiers.remove("f32")
        sources, result = (*sources[1:], "f32"), "f32"
    if name not in ARITHMETIC or not MODIFIERS.issuperset(modifiers):
        return None
    exact = (HANDS_NAN_ON if "NaN" in modifiers else ARITHMETIC)[name]

    def rounded(*operands: Array) -> Array:
        return exact(*operands).astype(FLOATS[result])

    def rounded_and_flushed(*operands: Array) -> Array:
        return flushed(rounded(*map(flushed, operands)))

    return Operation(sources, rounded_and_flushed if "ftz" in modifiers else rounded, result)
