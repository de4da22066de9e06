"""Conversions, comparisons and selections."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from .formats import BITS, COMPUTED_AS, FLOATS, INTEGERS, Array, encode, flushed, join
from .operation import Operation

# By the modifier; of a conversion from float to float, too, whose result is then a whole number.
TO_INTEGER: Mapping[str, Callable[[Array], Array]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}
Comparison = Callable[[Array, Array], Array]
COMPARISONS: Mapping[str, Comparison] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
OF_UNSIGNED: Mapping[str, str] = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
COMBINED: Mapping[str, Comparison] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}
PACKED_RESULTS: Mapping[str, str] = {"bf16x2": "bf16", "f16x2": "f16"}


def conversion(parts: tuple[str, ...], count: int) -> Operation | None:
    """cvt, which rounds to nearest even where its result has less room."""
    _, *modifiers, result, source = parts
    if result in PACKED_RESULTS and source == "f32" and modifiers == ["rn"]:
        half = PACKED_RESULTS[result]
        return Operation((source, source), lambda high, low: join([encode(low, half), encode(high, half)]), "b32")
    if len(modifiers) > 1 or not {"rn", *TO_INTEGER}.issuperset(modifiers):
        return None
    if not {source, result} <= COMPUTED_AS.keys():
        return None
    whole = TO_INTEGER.get(modifiers[0]) if modifiers else None
    if source in FLOATS and result in INTEGERS:
        return Operation((source,), _to_integer(whole, result), result) if whole else None
    return Operation((source,), lambda a: (whole(a) if whole else a).astype(COMPUTED_AS[result]), result)


def _to_integer(whole: Callable[[Array], Array], result: str) -> Callable[[Array], Array]:
    return lambda a: _saturated(whole(a.astype(np.float64)), result)


def _saturated(values: Array, result: str) -> Array:
    """Whole numbers as integers, those beyond the ends at them and NaN as 0."""
    ends = np.iinfo(COMPUTED_AS[result])
    below, above = values <= float(ends.min), values >= 2.0 ** (BITS[result] - (ends.min < 0))
    whole: Array = np.where(below | above | np.isnan(values), 0, values).astype(COMPUTED_AS[result])
    whole[below], whole[above] = ends.min, ends.max
    return whole


def comparison(parts: tuple[str, ...], count: int) -> Operation | None:
    """setp. Of floats, equ and its like hold for NaN, eq and its like do not."""
    _, relation, *modifiers, ptx_type = parts
    compare = (
        _float_comparison(relation) if ptx_type in FLOATS else COMPARISONS.get(OF_UNSIGNED.get(relation, relation))
    )
    flushes, modifiers = "ftz" in modifiers, [modifier for modifier in modifiers if modifier != "ftz"]
    if compare is None or ptx_type not in COMPUTED_AS:
        return None
    if flushes:
        compare = _of_flushed(compare)
    if not modifiers:
        return Operation((ptx_type, ptx_type), compare, "pred")
    if len(modifiers) > 1 or modifiers[0] not in COMBINED:
        return None
    return Operation((ptx_type, ptx_type, "pred"), _combined(compare, COMBINED[modifiers[0]]), "pred")


def _of_flushed(compare: Comparison) -> Comparison:
    return lambda a, b: compare(flushed(a), flushed(b))


def _combined(compare: Comparison, combine: Comparison) -> Callable[..., Array]:
    return lambda a, b, other: combine(compare(a, b), other)


def _float_comparison(relation: str) -> Comparison | None:
    def unordered(a: Array, b: Array) -> Array:
        return np.isnan(a) | np.isnan(b)

    if relation == "nan":
        return unordered
    if relation == "num":
        return lambda a, b: ~unordered(a, b)
    if ordered := COMPARISONS.get(relation):
        return lambda a, b: ordered(a, b) & ~unordered(a, b)
    if ordered_or_not := COMPARISONS.get(relation.removesuffix("u")):
        return lambda a, b: ordered_or_not(a, b) | unordered(a, b)
    return None


def selection(parts: tuple[str, ...], count: int) -> Operation:
    def choose(a: Array, b: Array, first: Array) -> Array:
        return np.where(first, a, b)

    return Operation((parts[-1], parts[-1], "pred"), choose, parts[-1])


def move(parts: tuple[str, ...], count: int) -> Operation:
    """mov, and cvta: global and generic addresses are the same here."""
    return Operation((parts[-1],), lambda a: a, parts[-1])
