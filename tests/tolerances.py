"""The error that a result may have: a budget against float64, from what torch eager itself gets wrong. None is tuned.

Design, section 3.4: the largest error against the float64 reference is at most 1.5 times torch eager's plus two
roundings of the largest output in the output's type; for a sum over rows, torch's plus two float32 roundings times the
root of the number of terms.
"""

from __future__ import annotations

import numpy as np
import torch

import fused_ops

Tensor = torch.Tensor

# Triton's interpreter truncates float32 to bfloat16, where a GPU rounds to nearest: every number that is stored, the
# total and a gradient among them, may be off by twice as much, and what is computed from it with it.
INTERPRETED_BFLOAT16 = 2.0


def rounding(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def largest_error(actual: Tensor, expected: np.ndarray | Tensor) -> float:
    """Largest absolute difference; inf where one is NaN or infinite and the other is not the same."""
    got = actual.detach().double().cpu().reshape(-1)
    want = torch.as_tensor(expected).detach().double().cpu().reshape(-1)
    same = (got == want) | (got.isnan() & want.isnan())
    if got.numel() == 0 or bool(same.all()):
        return 0.0
    difference = (got - want)[~same].abs()
    return float("inf") if not bool(difference.isfinite().all()) else float(difference.max())


def kernels_are_interpreted() -> bool:
    """Whether kernels were defined under TRITON_INTERPRET=1; false where there is no Triton."""
    return fused_ops.backend.interpreted()


def allowed_error(
    eager: Tensor,
    expected: np.ndarray | Tensor,
    dtype: torch.dtype,
    terms: int = 1,
    stored: torch.dtype | None = None,
) -> float:
    """The budget of one output: `eager` is torch's result for it, `terms` the length of a sum over rows (else 1),
    `stored` the type of what was summed, where that was stored before."""
    want = torch.as_tensor(expected).double()
    finite = want[want.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    budget = 1.5 * largest_error(eager, expected) + 2 * rounding(dtype) * largest
    if dtype == torch.float64:  # whose reference is rounded as often as what it judges, and may add in eager's order
        budget += 2 * rounding(dtype) * largest
    if terms > 1:
        budget += 2 * rounding(torch.float64 if dtype == torch.float64 else torch.float32) * terms**0.5 * largest
    if torch.bfloat16 in (dtype, stored) and kernels_are_interpreted():
        budget *= INTERPRETED_BFLOAT16
    return budget


def assert_within_budget(
    name: str,
    actual: Tensor,
    eager: Tensor,
    expected: np.ndarray | Tensor,
    terms: int = 1,
    stored: torch.dtype | None = None,
) -> None:
    """Fails with both figures where `actual` is further from the float64 reference than its budget allows."""
    error = largest_error(actual, expected)
    allowed = allowed_error(eager, expected, actual.dtype, terms, stored)
    assert error <= allowed, (
        f"{name} ({actual.dtype}): error {error:.3e} against float64, allowed {allowed:.3e}; "
        f"torch eager's own is {largest_error(eager, expected):.3e}"
    )
