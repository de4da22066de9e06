"""What an instruction computes in every thread, apart from where its operands are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .formats import Array, decode, encode, join, split


@dataclass(frozen=True)
class Operation:
    """A function of operands, each read as the type that is named for it, and the type of its result."""

    sources: tuple[str, ...]
    compute: Callable[..., Array]
    result: str


def packed(of_element: Operation, register: str, parts: int = 2) -> Operation:
    """The same on every part of registers that hold several values each."""

    def compute(*registers: Array) -> Array:
        operands = zip(*(split(bits, parts) for bits in registers), strict=True)
        results = (
            of_element.compute(*(decode(bits, kind) for bits, kind in zip(each, of_element.sources, strict=True)))
            for each in operands
        )
        return join([encode(result, of_element.result) for result in results])

    return Operation((register,) * len(of_element.sources), compute, register)
