"""Calls of both families, for what all norms have in common."""

from __future__ import annotations

from typing import Any

import pytest

from tests import channel_norm_cases, row_norm_cases
from tests.channel_norm_cases import with_layout
from tests.layouts import channels_last
from tests.norm_cases import Case

FUNCTIONS = row_norm_cases.FUNCTIONS + channel_norm_cases.FUNCTIONS
PLACES = row_norm_cases.PLACES + channel_norm_cases.PLACES


def functions(*quick: str, of: tuple[str, ...] = FUNCTIONS) -> pytest.MarkDecorator:
    """Parametrizes over every function, the channel norms but the quick ones in the long sweep: their three launches
    take an interpreter 100 ms."""
    quick += row_norm_cases.FUNCTIONS
    return pytest.mark.parametrize(
        "function", [pytest.param(function, marks=[] if function in quick else pytest.mark.full) for function in of]
    )


def add_functions(*quick: str) -> pytest.MarkDecorator:
    """The same over those that add the residual first."""
    return functions(*quick, of=tuple(function for function in FUNCTIONS if function.startswith("add_")))


def small_case(function: str, samples: int = 2, length: int | None = None, **fields: Any) -> Case:
    """A case of x [samples, 5], or [samples, 4, 3] in two groups, or so many elements instead of 5 or 3.

    Group norm's lies channels_last, so that both layouts are met.
    """
    if function in row_norm_cases.FUNCTIONS:
        return row_norm_cases.make_case(function, samples, length or 5, **fields)
    case = channel_norm_cases.make_case(function, samples, 4, length or 3, groups=2, **fields)
    return with_layout(case, channels_last) if "group" in function else case
