"""What `x += y` and its like are in a graph: torch.fx would take them for `x + y`, and lose that x changes.

Functions of our own, since torch.fx writes a call of `operator.iadd` as a statement, which would give a number that a
forward counts with another value wherever it stands.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

NAMES = (
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul",
    "iand", "ior", "ixor", "ilshift", "irshift",
)  # fmt: skip


def _named(name: str) -> Callable[[Any, Any], Any]:
    operation = getattr(operator, name)

    def in_place(x: Any, other: Any) -> Any:
        return operation(x, other)

    in_place.__name__ = in_place.__qualname__ = name
    return in_place


IN_PLACE = {name: _named(name) for name in NAMES}
globals().update(IN_PLACE)  # a pickled graph looks them up here
