"""The order in which a compiled kernel adds: the layouts of what its reductions take.

Two kernels reduce a tile to the same bits only where they spread it over threads and registers alike, which a compiler
decides for each kernel anew and an interpreter does not see.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .inert import Launch

_ALIAS = re.compile(r"^(#\w+) = (#ttg\.\w+<.*>)$", re.MULTILINE)
_REDUCTION = re.compile(r'"tt\.reduce"\(.*?axis = (\d+) .*?\}\) : \(([^)]*)\) ->', re.DOTALL)
_OPERAND = re.compile(r"tensor<((?:\d+x)+)(f\d+|bf16), (#ttg\.\w+<\{.*?\}>|#\w+)>")


def reduction_layouts(launches: Iterable[Launch]) -> set[tuple[str, str]]:
    """(shape and type, layout) of every tensor that these launches reduce, where its layout can change a bit: integers
    add in any order, and two numbers have but one, as long as they are no products (`moments.pairwise_sum`)."""
    found, reductions, kernels = set(), 0, []
    for launch in launches:
        kernels.append(launch.kernel)
        ttgir = launch.compiled.asm["ttgir"]
        aliases = dict(_ALIAS.findall(ttgir))
        for axis, operands in _REDUCTION.findall(ttgir):
            reductions += 1
            for shape, dtype, layout in _OPERAND.findall(operands):
                if shape.split("x")[int(axis)] != "2":
                    found.add((shape + dtype, _expand(layout, aliases)))
    if not reductions:
        raise RuntimeError(f"one of {', '.join(kernels)} must reduce something, but their IR shows no tt.reduce")
    return found


def _expand(layout: str, aliases: dict[str, str]) -> str:
    """A layout with the names in it written out: the same name may stand for another layout in another kernel."""
    return re.sub(r"#\w+(?![\w.])", lambda name: aliases.get(name[0], name[0]), layout)
