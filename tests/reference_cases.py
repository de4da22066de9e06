"""What the reference is judged by: torch's activations, a derived tolerance, finite differences, exact arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import isqrt
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

Arrays = dict[str, np.ndarray]
EPS = float(np.finfo(np.float64).eps)
INF, NAN = float("inf"), float("nan")

TORCH_ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "softplus": F.softplus,
}
# Where a slope jumps or a piece begins; smooth activations have none.
KINKS = {
    "relu": [0.0],
    "relu6": [0.0, 6.0],
    "leaky_relu": [0.0],
    "elu": [0.0],
    "selu": [0.0],
    "hardswish": [-3.0, 3.0],
    "hardsigmoid": [-3.0, 3.0],
}
ACTIVATIONS = [SimpleNamespace(name=name, parameters={}) for name in TORCH_ACTIVATIONS] + [
    SimpleNamespace(name="leaky_relu", parameters={"negative_slope": 0.3}),
    SimpleNamespace(name="elu", parameters={"alpha": 1.7}),
    SimpleNamespace(name="softplus", parameters={"beta": 2.0, "threshold": 3.0}),
]


def label(activation: Any) -> str:
    if activation is None:
        return "identity"
    return "-".join([activation.name, *map(str, activation.parameters.values())])


def kinks(activation: Any) -> list[float]:
    if activation is None:
        return []
    if activation.name == "softplus" and activation.parameters:
        return [activation.parameters["threshold"] / activation.parameters["beta"]]
    return KINKS.get(activation.name, [])


def torch_activation(activation: Any, x: torch.Tensor) -> torch.Tensor:
    return x if activation is None else TORCH_ACTIVATIONS[activation.name](x, **activation.parameters)


def float64_activation(activation: Any, x: torch.Tensor) -> torch.Tensor:
    """torch's activation; hardsigmoid composed, since F.hardsigmoid's slope is float32's 1 / 6 even in float64."""
    if activation is not None and activation.name == "hardsigmoid":
        return F.relu6(x + 3) / 6
    return torch_activation(activation, x)


def assert_within(tolerance: Any, expected: torch.Tensor, actual: np.ndarray) -> None:
    """|actual - expected| <= tolerance elementwise; NaN and Inf in the same places."""
    e = expected.detach().numpy()
    assert actual.dtype == np.float64
    assert actual.shape == e.shape
    finite = np.isfinite(e)
    np.testing.assert_array_equal(actual[~finite], e[~finite])
    excess = np.abs(actual[finite] - e[finite]) - np.broadcast_to(tolerance, e.shape)[finite]
    assert (excess <= 0.0).all(), f"{excess.max():.3g} beyond the tolerance"


SILU = SimpleNamespace(name="silu", parameters={})
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=label)
every_activation_and_none = pytest.mark.parametrize("activation", [None, *ACTIVATIONS], ids=label)


# ---- finite differences ----

# Balances the truncation error of the extrapolated difference, STEP^4, with its rounding, EPS / STEP.
STEP = EPS**0.2


def assert_matches_differences(
    outputs_of: Callable[[Arrays], tuple[np.ndarray, ...]],
    arrays: Arrays,
    d_outputs: tuple[np.ndarray, ...],
    gradients: Arrays,
) -> None:
    """`gradients` holds, for each of `arrays`, the derivative of the sum of d_outputs * outputs_of(arrays)."""
    assert set(gradients) == {f"d{name}" for name in arrays}

    def loss(changed: Arrays) -> float:
        return sum(float((d * output).sum()) for d, output in zip(d_outputs, outputs_of(changed), strict=True))

    # Each product of a loss, of which two outputs have 2 x size, is known to some 20 roundings of up to
    # max |d| max |output|.
    outputs = np.abs(np.asarray(outputs_of(arrays))).max()
    noise = 2 * d_outputs[0].size * 20 * EPS * max(np.abs(d).max() for d in d_outputs) * max(1.0, outputs)
    for name, array in arrays.items():
        assert gradients[f"d{name}"].shape == array.shape
        for index in np.ndindex(array.shape):
            coarse, fine = (difference(loss, arrays, name, index, step) for step in (STEP, STEP / 2))
            # The error of `fine` is a third of coarse - fine up to STEP^4: what is left is below that third.
            tolerance = abs(coarse - fine) / 3 + 4 * noise / STEP
            assert tolerance < 1e-4 * max(1.0, abs(fine)), "too coarse to find a wrong formula"
            assert abs(gradients[f"d{name}"][index] - (fine + (fine - coarse) / 3)) <= tolerance, (name, index)


def difference(
    of: Callable[[Arrays], float],
    arrays: Arrays,
    name: str,
    index: Any,
    step: float,
) -> float:
    up, down = arrays[name].copy(), arrays[name].copy()
    up[index] += step
    down[index] -= step
    return (of({**arrays, name: up}) - of({**arrays, name: down})) / (up[index] - down[index])


# ---- spans that are hard to normalize ----

HARD_SPANS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "large mean": lambda span: 1e4 + 1e-2 * span,
    "constant": lambda span: np.full_like(span, 3.7),
    "zero": np.zeros_like,
    "huge": lambda span: 3e38 * span,
    "nan": lambda span: np.where(np.arange(span.size) == 2, NAN, span),
    "inf": lambda span: np.where(np.arange(span.size) == 2, INF, span),
    "both infs": lambda span: np.where(np.arange(span.size) < 2, [INF, -INF] * (span.size // 2), span),
}


def largest(*values: Any) -> float:
    """The largest finite magnitude, at least 1."""
    finite = (value[np.isfinite(value)] for value in map(np.asarray, values))
    return max(1.0, *(np.abs(value).max(initial=0.0) for value in finite))


def exactly_standardized(span: np.ndarray) -> np.ndarray:
    """(span - mean) / sqrt(var) in exact arithmetic, rounded once."""
    exact = [Fraction(value) for value in span]
    deviation = [value - sum(exact) / len(exact) for value in exact]
    variance = sum(value**2 for value in deviation) / len(exact)
    root = Fraction(isqrt(int(variance * 10**60)), 10**30)  # good to 1e-28 of a spread of 1e-2
    return np.array([float(value / root) for value in deviation])
