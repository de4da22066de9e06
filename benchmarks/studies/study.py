"""What a study is: conditions, each measured with several seeds, and what is claimed of all that was found."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Numbers = Mapping[str, Any]
"""What one condition gave with one seed, as JSON can hold it."""
Found = Mapping[str, Sequence[Numbers]]
"""By the condition's name, an entry a seed."""


@dataclass(frozen=True)
class Claim:
    """One expectation, the numbers that decide it, and whether they bear it out."""

    expected: str
    found: str
    holds: bool


S = TypeVar("S")
C = TypeVar("C")


@dataclass(frozen=True)
class Study(Generic[S, C]):
    """An experiment that judges itself.

    Settings are frozen dataclasses at the head of the study's file. `without_cause` are the quick ones with that taken
    away (`cause` says what) which the claims are put down to: a study whose verdict stays the same has shown nothing.
    Conditions, which are picklable, are measured apart from each other, in any order and process. `meaning` is what was
    thought once the numbers were there.
    """

    name: str
    title: str
    source: str
    expected: str
    full: S
    quick: S
    cause: str
    without_cause: S
    conditions: Callable[[S], Mapping[str, C]]
    measure: Callable[[S, C, int, torch.device], Numbers]
    claims: Callable[[S, Found], Sequence[Claim]]
    draw: Callable[[S, Found, Figure], None]
    meaning: str = ""


REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"


def verdict(claims: Sequence[Claim]) -> str:
    """Reproduced where every claim holds."""
    return REPRODUCED if all(claim.holds for claim in claims) else NOT_REPRODUCED


def values(found: Found, condition: str, number: str) -> list[Any]:
    """One number of a condition, or a curve of it, seed by seed."""
    return [one[number] for one in found[condition]]


def over_seeds(numbers: Sequence[float], form: str = ".3g") -> str:
    """Their mean and range as text: ``0.12 (0.1 to 0.15)``."""
    low, mean, high = (format(value, form) for value in (min(numbers), statistics.mean(numbers), max(numbers)))
    return mean if low == high else f"{mean} ({low} to {high})"


def below(
    expected: str,
    small: Sequence[float],
    large: Sequence[float],
    form: str = ".3g",
    margin: float = 0,
    by: float = 0,
) -> Claim:
    """Holds where with every seed the one is below the other by more than the margin, or `by` a share of it."""
    holds = all((1 - by) * b - a > margin for a, b in zip(small, large, strict=True))
    return Claim(expected, f"{over_seeds(small, form)} against {over_seeds(large, form)}", holds)


def not_above(expected: str, one: Sequence[float], other: Sequence[float], margin: float, form: str = ".3g") -> Claim:
    """Holds where on average over the seeds the one exceeds the other by no more than the margin."""
    holds = statistics.mean(one) - statistics.mean(other) <= margin
    return Claim(expected, f"{over_seeds(one, form)} against {over_seeds(other, form)}", holds)


def draw_mean(
    axes: Axes, x: Sequence[Any], curves: Sequence[Sequence[float]], line: str = "-", *, color: str, **style: Any
) -> None:
    """The mean over the seeds, and each seed thin behind it, without markers."""
    for curve in curves:
        axes.plot(x, curve, line.lstrip("os"), color=color, linewidth=0.6, alpha=0.4)
    axes.plot(x, [statistics.mean(at) for at in zip(*curves, strict=True)], line, color=color, **style)
