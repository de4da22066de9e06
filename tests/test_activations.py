"""Device activations, value and slope, against the NumPy reference: far out, at kinks, at NaN, and near 0."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fused_ops import Activation, reference
from fused_ops.activation import KNOWN
from tests.norm_cases import short
from tests.tolerances import rounding

triton = pytest.importorskip("triton", reason="Triton is not installed, so there is no device code")

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from fused_ops.kernels.activations import ACTIVATIONS  # noqa: E402

# Inf - Inf is what some of these points are about, and NumPy, which interprets the kernels, warns of it; lanes that
# tl.where does not choose may overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

EVERY = [
    *(Activation(name) for name in KNOWN),
    Activation("leaky_relu", negative_slope=0.3),
    Activation("leaky_relu", negative_slope=0.0),
    Activation("leaky_relu", negative_slope=-0.5),
    Activation("elu", alpha=1.7),
    Activation("elu", alpha=-0.4),
    Activation("softplus", beta=2.0, threshold=3.0),
    Activation("softplus", beta=0.25, threshold=20.0),
]
every_activation = pytest.mark.parametrize("activation", EVERY, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)


@triton.jit
def evaluate_kernel(
    Z_ptr, Value_ptr, Slope_ptr, alpha: tl.float64, beta: tl.float64,
    VALUE: tl.constexpr, SLOPE: tl.constexpr, PASSES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The value and the slope at every z, with the parameters as the norm kernels pass them."""
    index = tl.arange(0, SIZE)
    z = tl.load(Z_ptr + index)
    alpha = tl.full((), alpha, z.dtype)
    beta = tl.full((), beta, z.dtype)
    tl.store(Value_ptr + index, VALUE(z, alpha, beta))
    if PASSES is not None:
        tl.store(Slope_ptr + index, tl.where(PASSES(z), 1.0, alpha))
    else:
        tl.store(Slope_ptr + index, SLOPE(z, alpha, beta))


def evaluate(activation: Activation, z: np.ndarray, dtype: torch.dtype, device: torch.device) -> list[np.ndarray]:
    """Value and slope at z, computed in `dtype`, as float64."""
    padded = torch.zeros(triton.next_power_of_2(len(z)), dtype=dtype)
    padded[: len(z)] = torch.from_numpy(z)
    padded = padded.to(device)
    results = torch.full_like(padded, math.nan), torch.full_like(padded, math.nan)
    value, slope, passes = ACTIVATIONS[activation.name]
    evaluate_kernel[(1,)](padded, *results, *activation.scalars, value, slope, passes, len(padded))
    return [result[: len(z)].double().cpu().numpy() for result in results]


@pytest.fixture(autouse=True)
def exp2_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, exp2 in float32 keeps what is below the smallest normal number; a GPU makes 0 of it."""

    def exp2(self: Any, argument: Any) -> Any:
        found = np.exp2(argument.data)
        if found.dtype == np.float32:
            found = np.where(found < np.finfo(np.float32).tiny, np.float32(0), found)
        return interpreter.TensorHandle(found, argument.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_exp2", exp2)


def kinks(activation: Activation) -> list[float]:
    """Where the slope jumps or another piece begins."""
    if activation.name == "softplus":
        return [activation.parameters["threshold"] / activation.parameters["beta"]]
    if activation.name in ("hardswish", "hardsigmoid"):
        return [-3.0, 3.0]
    return [0.0, 6.0] if activation.name == "relu6" else [0.0]


def points(activation: Activation, dtype: torch.dtype) -> np.ndarray:
    """Dense near 0, every power of two of the type up to 1e4, both sides of every kink: all exact in `dtype`."""
    dense = torch.linspace(-20.0, 20.0, 1601, dtype=dtype)
    powers = torch.tensor([2.0**k for k in range(-30, 14)] + [15.0, 89.0, 800.0, 1e4], dtype=dtype)
    kink = torch.tensor(kinks(activation), dtype=dtype)
    infinity = torch.tensor(math.inf, dtype=dtype)
    beside = [torch.nextafter(kink, -infinity), kink, torch.nextafter(kink, infinity)]
    zeros = torch.tensor([0.0, -0.0], dtype=dtype)
    return torch.cat([dense, powers, -powers, *beside, zeros]).double().numpy()


def expected_at(activation: Activation, z: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    # The kernel's parameters are rounded to the type that it computes in, and so are the reference's.
    rounded = {key: torch.tensor(value, dtype=dtype).item() for key, value in activation.parameters.items()}
    activation = Activation(activation.name, **rounded)
    return reference.activation_value(z, activation), reference.activation_slope(z, activation)


def assert_within(name: str, z: np.ndarray, actual: np.ndarray, expected: np.ndarray, allowed: np.ndarray) -> None:
    excess = np.abs(actual - expected) - allowed
    assert np.isfinite(actual).all()
    worst = excess.argmax()
    assert excess[worst] <= 0, f"{name} at {z[worst]}: {actual[worst]}, but {expected[worst]}"


def assert_digits(name: str, z: np.ndarray, actual: np.ndarray, expected: np.ndarray, dtype: torch.dtype) -> None:
    """Relative accuracy, wherever the type can hold it."""
    # Where the result decays as exp(-t), t is known to a few roundings of its own size, which make a relative error.
    decay = np.maximum(0.0, -np.log(np.maximum(np.abs(expected), 1e-300) / np.maximum(np.abs(z), 1e-30)))
    allowed = rounding(dtype) * (8 + 4 * decay) * np.abs(expected)
    # exp of the argument must be a normal number, too, on a GPU. It is z times smaller than the result.
    holds = np.abs(expected) > torch.finfo(dtype).tiny * np.maximum(1.0, 2 * np.abs(z))
    assert_within(name, z[holds], actual[holds], expected[holds], allowed[holds])


def test_every_name_has_device_code() -> None:
    assert set(ACTIVATIONS) == {None, *KNOWN}


@every_dtype
@every_activation
def test_value_and_slope(activation: Activation, dtype: torch.dtype, device: torch.device) -> None:
    z = points(activation, dtype)
    # Some four roundings, one after another, of intermediates no larger than the result, z (near 0 only) or 1 are what
    # these formulas make, and a GPU's exp and division may add two each. The reference itself multiplies 1 - t * t,
    # known to a float64 rounding of 1, by z; past 37 it is 0.
    of_reference = 4 * rounding(torch.float64) * np.minimum(np.abs(z), 37.0)
    results = evaluate(activation, z, dtype, device)
    for name, actual, expected in zip(("value", "slope"), results, expected_at(activation, z, dtype), strict=True):
        allowed = 8 * rounding(dtype) * np.maximum(1.0, np.abs(expected)) + of_reference
        assert_within(name, z, actual, expected, allowed)


# gelu is 0.5 * z * (1 + erf) in torch and here in float64, and the sum cancels for negative z.
@every_dtype
@pytest.mark.parametrize("activation", [each for each in EVERY if each.name != "gelu"], ids=str)
def test_small_values_keep_their_digits(activation: Activation, dtype: torch.dtype, device: torch.device) -> None:
    z = points(activation, dtype)
    actual, _ = evaluate(activation, z, dtype, device)
    expected, _ = expected_at(activation, z, dtype)
    assert_digits("value", z, actual, expected, dtype)


def test_small_values_of_gelu_keep_most_digits(device: torch.device) -> None:
    """In float32, where erf would leave one at -5, and none from -5.5 on."""
    z = np.linspace(-12.0, -0.01, 1200).astype(np.float32).astype(np.float64)
    actual, _ = evaluate(Activation("gelu"), z, torch.float32, device)
    expected = z * 0.5 * np.array([math.erfc(-each * math.sqrt(0.5)) for each in z])
    np.testing.assert_allclose(actual, expected, rtol=2e-5)


MONOTONE = [each for each in EVERY if each.name in ("elu", "selu", "sigmoid", "softplus")]


@every_dtype
@pytest.mark.parametrize("activation", MONOTONE, ids=str)
def test_small_slopes_keep_their_digits(activation: Activation, dtype: torch.dtype, device: torch.device) -> None:
    """Of those whose slope does not change its sign, where it is the small difference of larger numbers."""
    z = points(activation, dtype)
    _, actual = evaluate(activation, z, dtype, device)
    _, expected = expected_at(activation, z, dtype)
    assert_digits("slope", z, actual, expected, dtype)


@every_dtype
@every_activation
def test_nan_and_infinity_are_those_of_torch(activation: Activation, dtype: torch.dtype, device: torch.device) -> None:
    z = np.array([math.nan, math.inf, -math.inf])
    results = evaluate(activation, z, dtype, device)
    for actual, expected in zip(results, expected_at(activation, z, dtype), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2 * rounding(dtype), atol=0)
